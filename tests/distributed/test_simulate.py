"""Forecasts against closed formulas, against the clocks of a real run, and against the clock on the wall."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import gang
import localgrad
from bridged import bridged
from localgrad import methods
from localgrad.distributed import block_parallel
from localgrad.distributed.link import GRADIENTS, VALUES, WEIGHTS
from localgrad.distributed.simulate import BlockCost, Forecast, LinkSpeed, forecast, layouts
from localgrad.distributed.timeline import Event, chrome_trace, picture
from zoo import METHODS, TASK, build
from zoo import batch as images

FAST = LinkSpeed(1e15, 0.0)


def cost(forward: float, rest: float, backward: float = 0.0, features: int = 0, parameters: int = 0) -> BlockCost:
    return BlockCost(forward, rest, backward, features, parameters)


def test_forecasts_equal_closed_formulas() -> None:
    even = [cost(1.0, 3.0, 2.0, features=800, parameters=600)] * 4

    def seconds(schedule: str, link: LinkSpeed = FAST, **options: object) -> Forecast:
        return forecast(even, link, 16, schedule, **options)

    for stages in (1, 2, 4):
        local = seconds("local", stages=stages)
        assert local.seconds == pytest.approx(16.0 / stages) and local.bubble == pytest.approx(0.0, abs=1e-9)
        for micro in (1, 4, 8):
            for schedule in ("gpipe", "1f1b"):
                found = seconds(schedule, stages=stages, micro_batches=micro)
                assert found.seconds == pytest.approx(12.0 / stages * (micro + stages - 1) / micro)
                assert found.bubble == pytest.approx((stages - 1) / (micro + stages - 1))
    assert seconds("local", stages=4, link=LinkSpeed(100.0, 5.0)).seconds == pytest.approx(8.0)  # 800 bytes at 100/s
    assert seconds("local", stages=4, link=LinkSpeed(1e15, 1.5)).seconds == pytest.approx(4.0)  # latency costs the fill
    ring = 2 * 3 / 4 * 2400 / 1000.0 + 2 * 3 * 0.5
    found = seconds("data", link=LinkSpeed(1000.0, 0.5), replicas=4)
    assert found.seconds == pytest.approx(12.0 + ring) and found.samples_per_second == 64 / found.seconds
    uneven = [cost(1.0, 1.0), cost(1.0, 6.0), cost(1.0, 2.0)]
    found = forecast(uneven, FAST, 1, "local", stages=2)
    assert found.place == (0, 0, 1) or found.seconds == pytest.approx(9.0)
    best = layouts(even, FAST, 16, 4, micro_batches=4)
    assert best[0].samples_per_second == max(f.samples_per_second for f in best) and len(best) == 7


def periods(name: str, delays: dict[int, float], steps: int, micro: int) -> list[list[list[object]]]:
    """Events on the virtual clock of each rank: forward 1 s, each loss 2 s, gradients from another rank 3 s."""
    method = {
        "dgl": METHODS["dgl"],
        "man, after": methods.man(METHODS["dgl"]),
        "man, before": bridged(METHODS["dgl"], exchange="before"),
        "windows": METHODS["windows(dgl)"],
    }[name]
    size = dist.get_world_size()
    network = build("cnn", methods.accumulation(method, parts=micro), size)
    stage = block_parallel(network, init_device_mesh("cpu", (size,))).stage
    stage.timeline.simulate(lambda kind, block: {"forward": 1.0, "loss": 2.0, "back": 3.0}[kind], delays.__getitem__)
    x, y = images(8)
    for step in range(steps):
        localgrad.backward(network, x, y, step)
        localgrad.exchange(network)
    stage.close()
    return [[e.kind, e.step, e.part, e.start, e.end] for e in stage.timeline.events if e.end > e.start]


NONE, SOME = {VALUES: 0.0, GRADIENTS: 0.0, WEIGHTS: 0.0}, {VALUES: 0.5, GRADIENTS: 0.25, WEIGHTS: 1.25}
CASES = [
    ("dgl", SOME, 1),
    ("man, after", SOME, 1),
    ("man, before", NONE, 1),
    ("man, before", SOME, 1),
    ("windows", SOME, 1),
    ("windows", NONE, 2),
    ("windows", SOME, 4),
]
STEPS = 9


def every_case() -> list[list[list[object]]]:
    return [periods(name, delays, STEPS, micro) for name, delays, micro in CASES]


def literal(name: str, delays: dict[int, float], micro: int, ranks: int) -> dict[tuple[int, int], float]:
    """When each rank ends each step: the rules of block_parallel's docstring written down once more, as a recursion."""
    end = {(r, -1): 0.0 for r in range(ranks)}
    weights = {(r, -1): 0.0 for r in range(ranks)}
    for t in range(STEPS):
        values: dict[tuple[int, int], float] = {}
        returned: dict[tuple[int, int], float] = {}
        clock = {r: end[r, t - 1] for r in range(ranks)}
        for r in range(ranks):
            for m in range(micro):
                clock[r] = max(clock[r], values.get((r, m), 0.0)) + 1.0
                values[r + 1, m] = clock[r] + delays[VALUES]
                if r < ranks - 1 and name == "man, after" and t > 0:
                    clock[r] = max(clock[r], weights[r + 1, t - 1] + delays[WEIGHTS])
                clock[r] += 2.0
                if name == "windows" and r > 0:  # the loss of the block alone, then that of the window that ends here
                    clock[r] += 2.0
                    returned[r - 1, m] = clock[r] + delays[GRADIENTS]
                if r < ranks - 1 and name == "man, before" and t > 0:
                    clock[r] = max(clock[r], weights[r + 1, t - 1] + delays[WEIGHTS])
        for r in range(ranks - 1) if name == "windows" else ():
            for m in range(micro):
                clock[r] = max(clock[r], returned[r, m]) + 3.0
        for r in range(ranks):
            end[r, t] = weights[r, t] = clock[r]
    return end


def test_virtual_clocks_of_real_runs_follow_the_stated_timing() -> None:
    """The events of real runs, every message sent, on clocks that do not depend on the machine."""
    ranks = gang.run(every_case, 3)
    for index, (name, delays, micro) in enumerate(CASES):
        expected = literal(name, delays, micro, 3)
        for rank, found in enumerate(ranks):
            events = found[index]
            ends = {step: max(end for _, s, _, _, end in events if s == step) for step in range(STEPS)}
            assert ends == pytest.approx({t: expected[rank, t] for t in range(STEPS)}, abs=1e-6), (name, micro, rank)
    travel = 0.5 + 1.25

    def period(name: str, delays: dict[int, float]) -> float:
        return (literal(name, delays, 1, 3)[0, STEPS - 1] - literal(name, delays, 1, 3)[0, STEPS - 7]) / 6

    assert period("dgl", NONE) == period("dgl", SOME) == 3.0  # no bubble, whatever the latency
    # A chain of j ranks that wait for each other's weights: j (T + c) + T seconds in j + 1 steps, T = 3.
    assert period("man, after", SOME) == pytest.approx((2 * (3.0 + travel) + 3.0) / 3)
    assert period("man, before", NONE) == 3.0


class Sleep(torch.autograd.Function):
    """Takes some seconds forward and some backward, of a core that is free for others."""

    @staticmethod
    def forward(ctx: object, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradient, None, None


class Sleeper(nn.Module):
    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.seconds = forward, backward
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(self.linear(x), *self.seconds)


def sleeping(seconds: list[tuple[float, float]], place: list[int], local: bool, micro: int) -> list[list[object]]:
    """Events of ten steps on the wall, in seconds since the first."""
    modules = [Sleeper(*pair) for pair in seconds]
    method = methods.dgl(TASK) if local else methods.accumulation(methods.e2e(TASK), parts=micro)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*modules, nn.Linear(8, 4))
        parts = [*modules[:-1], nn.Sequential(modules[-1], model[-1])]
        network = localgrad.localize(model, method, parts, example=torch.randn(2, 8))
    for mine in network.parameters():
        dist.broadcast(mine.detach(), 0)
    stage = block_parallel(network, init_device_mesh("cpu", (2,)), place=place).stage
    x, y = torch.randn(8, 8), torch.arange(8) % 4
    localgrad.backward(network, x, y)  # the first messages say how large they are
    localgrad.exchange(network)
    dist.barrier()
    stage.timeline.record()
    began = time.perf_counter()
    for step in range(1, 13):
        localgrad.backward(network, x, y, step)
        localgrad.exchange(network)
    stage.close()
    return [[e.kind, e.step, e.part, e.block, e.start - began, e.end - began] for e in stage.timeline.events]


MEASURED = {
    "balanced": ([(0.1, 0.1), (0.1, 0.1)], [0, 1], True, 1),
    "second twice as slow": ([(0.06, 0.06), (0.12, 0.12)], [0, 1], True, 1),
    "four blocks, 1 and 3": ([(0.12, 0.12), (0.04, 0.04), (0.04, 0.04), (0.04, 0.04)], [0, 1, 1, 1], True, 1),
    "end to end, 4 micro-batches (GPipe)": ([(0.06, 0.12), (0.06, 0.12)], [0, 1], False, 4),
}


@pytest.mark.slow_distributed
def test_forecasts_are_within_fifteen_percent_of_the_wall(tmp_path: Path) -> None:
    """Blocks that sleep, on two ranks, in four configurations."""
    for name, (seconds, place, local, micro) in MEASURED.items():
        rows = [[Event(*event) for event in rank] for rank in gang.run(sleeping, 2, *MEASURED[name])]
        ends = [max(e.end for e in rows[1] if e.step == step) for step in (4, 12)]
        measured = (ends[1] - ends[0]) / 8
        costs = [cost(f * micro, b * micro, b * micro) for f, b in seconds]
        expected = forecast(
            costs, FAST, 8, "local" if local else "gpipe", stages=2, micro_batches=micro, place=place
        ).seconds
        print(f"{name}: {measured:.4f} s a step, forecast {expected:.4f} s, {measured / expected - 1:+.1%}")
        assert abs(measured / expected - 1) < 0.15
        if name == "balanced":
            idle = []
            for row in rows:
                begin, end = (max(e.end for e in row if e.step == step) for step in (4, 12))
                idle.append(1 - sum(e.end - e.start for e in row if 4 < e.step <= 12) / (end - begin))
            print(f"idle {idle[0]:.1%} and {idle[1]:.1%}")
            assert max(idle) < 0.08


def test_pictures_and_traces_show_every_event(tmp_path: Path) -> None:
    found = forecast([cost(1.0, 2.0, 2.0)] * 2, FAST, 1, "1f1b", stages=2, micro_batches=2)
    rows = {rank: list(events) for rank, events in enumerate(found.events)}
    trace = json.loads(chrome_trace(rows))["traceEvents"]
    assert len(trace) == sum(map(len, rows.values())) and trace[0]["dur"] == 1e6 * (rows[0][0].end - rows[0][0].start)
    picture({"1F1B": rows}, tmp_path / "timeline.png", 0.0, 10.0)
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_ranks_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    from localgrad.cli import app

    app(["simulate", "resnet8", "--ranks", "2", "--num-blocks", "2", "--batch-size", "4"], standalone_mode=False)
    blocks, layouts = capsys.readouterr().out.split("layout", 1)
    assert f"{(4 * 16 * 32 * 32 * 4 + 4 * 8) / 2**20:.2f} MiB" in blocks
    rates = [int(line.split("%")[0].split()[-4]) for line in layouts.splitlines() if "%" in line]
    assert rates == sorted(rates, reverse=True) and len(rates) == 4
