"""Steps of many ways in turn: bytes against literal loops, the frontier against brute force, never seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import localgrad
from localgrad import ConfigError, methods
from localgrad.costs import cost
from localgrad.errors import LocalgradError
from localgrad.measure.memory import measure
from localgrad.spec import described, parse_method
from localgrad.study.contest import contest
from localgrad.study.contest_plots import pareto_picture, timeline_picture, timeline_rows
from localgrad.study.contest_report import Contest, Row
from localgrad.study.ways import Way, standard_ways

TASK = localgrad.tasks.classification(10)
SETTINGS: dict[str, Any] = {"batch_size": 8, "image_size": 16, "num_classes": 10}


@pytest.fixture(scope="module")
def found() -> Contest:
    ways = [
        way
        for way in standard_ways(TASK, [["dgl"]], [3], parts=2)
        if not way.has("compile") and not way.offload and way.optimizer == "SGD"
    ]
    bf16 = Way("end-to-end", "end-to-end", methods.e2e(TASK), variant="bf16+channels_last")
    return contest("resnet8", [*ways, bf16], **SETTINGS, rounds=1, timeline=True)


def row(found: Contest, label: str) -> Row:
    return next(r for r in found.rows if r.label == label)


def plain_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, parts: int = 1) -> tuple[int, int]:
    """(activations, total) of the second step of the loop everybody writes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.cross_entropy(model(a), b) * (1 / parts)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    memory = measure(step, model.parameters())
    return memory.peak_activations, memory.peak_total


@pytest.mark.parametrize(("label", "parts"), [("end-to-end", 1), ("accumulation x2", 2)])
def test_bytes_are_those_of_a_literal_loop(found: Contest, label: str, parts: int) -> None:
    model = localgrad.models.resnet8().train()
    expected = plain_step(model, torch.randn(8, 3, 16, 16), torch.randint(10, (8,)), parts)
    measured = row(found, label)
    assert measured.activation_bytes is not None and measured.total_bytes is not None
    logits = 8 * 10 * 4 // parts  # the engine holds the model's output; the rest is whether a part has labels at all
    counted = 8 if parts > 1 else 0  # what the loss of the whole batch divides by
    assert measured.activation_bytes - expected[0] == measured.total_bytes - expected[1] == logits + parts + counted


def test_bytes_of_a_local_step_are_those_of_a_literal_loop() -> None:
    ways = [way for way in standard_ways(TASK, [["dgl"]], [3]) if way.kind == "local"][:2]
    found = contest("resnet8", ways, batch_size=8, image_size=8, num_classes=10, rounds=1)
    model = localgrad.models.resnet8().train()
    x, y = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
    network = localgrad.localize(model, methods.dgl(TASK), 3, example=x[:2]).train()
    blocks = [network.block_parameters(k) for k in range(3)]
    optimizers = [torch.optim.SGD(parameters, lr=1e-3, momentum=0.9) for parameters in blocks]

    def step(per_block: bool) -> None:
        def update(k: int) -> None:
            optimizers[k].step()
            optimizers[k].zero_grad(set_to_none=True)

        for _, loss in localgrad.local_losses(network, x, y, on_block_done=update if per_block else None):
            loss.backward()
        for k in range(0 if per_block else 3):
            update(k)

    step(True)
    trained = list(network.parameters())
    for per_block, label in ((False, "dgl K=3"), (True, "dgl K=3, per-block step")):
        expected = measure(lambda per_block=per_block: step(per_block), trained)
        assert row(found, label).total_bytes == expected.peak_total
        assert row(found, label).activation_bytes == expected.peak_activations
    assert (row(found, "dgl K=3, per-block step").total_bytes or 0) < (row(found, "dgl K=3").total_bytes or 0)


def test_flops_and_parameters_are_those_of_the_other_counter(found: Contest) -> None:
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    for label, method, k in (("end-to-end", methods.e2e(TASK), 1), ("dgl K=3", methods.dgl(TASK), 3)):
        network = localgrad.localize(localgrad.models.resnet8(), method, k, example=x[:2])
        other = cost(network, x, y)
        assert row(found, label).flops == other.flops
        assert row(found, label).auxiliary_parameters == other.auxiliary_parameters
        assert found.parameters == other.parameters


def test_what_the_gradients_are(found: Contest) -> None:
    micro = "exact, BatchNorm over micro-batches"
    assert {r.label: r.gradients for r in found.rows} == {
        "end-to-end": "exact",
        "end-to-end, optimizer in backward": "exact",
        "checkpointing every unit": "exact",
        "checkpointing every unit, optimizer in backward": "exact",
        "checkpointing every unit, selective": "exact",
        "checkpointing K=3": "exact",
        "accumulation x2": micro,
        "checkpointing every unit, x2": micro,
        "dgl K=3": "local",
        "dgl K=3, per-block step": "local",
        "dgl K=3, per-block step, checkpointing inside": "local",
        "dgl K=3, x2": "local",
        "dgl K=3, per-block step, x2": "local",
        "dgl K=3, per-block step, checkpointing inside, x2": "local",
        "end-to-end, bf16+channels_last": "exact",
    }
    assert row(found, "checkpointing every unit").num_blocks == 5  # stem, three units, classifier
    assert (
        row(found, "dgl K=3, per-block step, checkpointing inside").auxiliary_parameters
        == row(found, "dgl K=3").auxiliary_parameters
    )
    reference = found.rows[0]
    assert reference.time_ratio == 1.0 and len(reference.rounds) == 1
    assert (row(found, "end-to-end, bf16+channels_last").total_bytes or 0) < 0.7 * (reference.total_bytes or 0)


def test_a_compiled_way_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    e2e = Way("end-to-end", "end-to-end", methods.e2e(TASK))
    local = Way("dgl K=3", "local", methods.dgl(TASK), 3)
    networks: list[nn.Module] = []

    def kept(*values: Any, **named: Any) -> Any:
        networks.append(localgrad.localize(*values, **named))
        return networks[-1]

    monkeypatch.setattr("localgrad.study.contest.localize", kept)
    ways = [e2e, replace(e2e, variant="fp32+compile"), replace(local, variant="fp32+compile"), local]
    contest("resnet8", ways, **SETTINGS, rounds=1)
    plain = {module for network in (networks[0], networks[3]) for module in network.modules()}
    assert compiled and not plain & set(compiled)
    assert not set(networks[1].modules()) & set(networks[2].modules()), "each way is cut, and compiled, elsewhere"


def test_batchnorm_is_looked_for() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 10))
    ways = [Way("a", "accumulation", methods.accumulation(methods.e2e(TASK), parts=2))]
    (only,) = contest(model, ways, batch_size=4, image_size=4, num_classes=10, rounds=1).rows
    assert only.gradients == "exact" and only.flops is not None
    assert only.flops == 2 * 4 * (2 * 48 * 10 + 3 * 10 * 10)  # the first layer's input needs no gradient


def test_gradients_of_any_step_count() -> None:
    ways = [
        Way("p", "local", methods.pgl(methods.dgl(TASK), every=10), 2),
        Way("d", "local", methods.deep_supervision(TASK), 2),
    ]
    rows = contest("resnet8", ways, **SETTINGS, rounds=1).rows
    assert [r.gradients for r in rows] == ["local", "exact"]  # step 0 of the first is guided by back-propagation


def test_a_module_is_left_alone() -> None:
    model = localgrad.models.resnet8().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    contest(model, [Way("e", "end-to-end", methods.e2e(TASK))], **SETTINGS, rounds=1)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_way_that_cannot_be_built_is_left_out_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    ways = [Way("e", "end-to-end", methods.e2e(TASK)), Way("t", "local", methods.trgl(methods.dgl(TASK)), 2)]
    result = contest(model, ways, batch_size=4, image_size=8, num_classes=10, rounds=1)
    assert [r.name for r in result.rows] == ["e"]
    assert "residual" in result.skipped[0]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
def test_a_way_that_needs_more_samples_is_left_out_with_the_reason(batch_size: int) -> None:
    """BatchNorm in a head has one value per channel and sample."""
    ways = [
        Way("e", "end-to-end", methods.e2e(TASK)),
        Way("d", "local", methods.dgl(TASK), 2),
        Way("a", "local", methods.accumulation(methods.dgl(TASK), parts=4), 2),
    ]
    result = contest("resnet8", ways, batch_size=batch_size, image_size=8, num_classes=10, rounds=1)
    assert [r.name for r in result.rows] == ["e"] + ["d"] * (batch_size > 1)
    assert all("BatchNorm needs more than one sample" in reason for reason in result.skipped)


def test_the_frontier_is_what_brute_force_finds(found: Contest) -> None:
    template = found.rows[0]
    points = [(m, t) for m, t in product((10, 20, 30), (1.0, 1.5, 2.0)) if m * t >= 30] + [(30, 1.0), (25, 1.2)]
    rows = [
        replace(template, name=str(k), kind="local" if k % 2 else "accumulation", total_bytes=m, time_ratio=t)
        for k, (m, t) in enumerate(points)
    ]
    result = replace(found, rows=tuple(rows))

    def better(a: Row, b: Row) -> bool:
        assert a.total_bytes and b.total_bytes
        fewer, faster = a.total_bytes <= b.total_bytes, a.time_ratio <= b.time_ratio
        return fewer and faster and (a.total_bytes < b.total_bytes or a.time_ratio < b.time_ratio)

    expected = {r.name for r in rows if not any(better(o, r) for o in rows)}
    assert {r.name for r in result.frontier} == expected and 0 < len(expected) < len(rows)
    assert [r.total_bytes for r in result.frontier] == sorted(r.total_bytes or 0 for r in result.frontier)
    for r in rows:
        exact = [o for o in rows if o.kind != "local" and better(o, r)]
        by = result.dominated_by(r)
        assert (by is not None) == (r.kind == "local" and bool(exact))
        assert by is None or by.time_ratio == min(o.time_ratio for o in exact)


def test_timelines_end_where_the_step_does(found: Contest) -> None:
    for r in found.rows:
        seconds = [at for at, *_ in r.timeline]
        assert seconds == sorted(seconds)
        assert max(live for _, live, *_ in r.timeline) == r.total_bytes
        assert max(live - gradients for _, live, gradients, _ in r.timeline) == r.activation_bytes
        assert all(0 <= gradients <= live for _, live, gradients, _ in r.timeline)
    names = [r.name for r in timeline_rows(found)]
    assert names[0] == "end-to-end" and names[1].startswith("checkpointing") and names[2].startswith("dgl")


def test_pictures_json_and_table(found: Contest, tmp_path: Path) -> None:
    pareto_picture(found, tmp_path / "pareto.png")
    timeline_picture(found, tmp_path / "timeline.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("pareto", "timeline"))
    kept = json.loads(json.dumps(found.as_dict()))
    assert [row["total_bytes"] for row in kept["rows"]] == [r.total_bytes for r in found.rows]
    untimed = replace(found, rows=tuple(replace(r, timeline=()) for r in found.rows))
    with pytest.raises(ConfigError, match="timeline=True"):
        timeline_picture(untimed, tmp_path / "none.png")
    lines = [line for line in str(found).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(found.rows) and len({line.count("|") for line in lines}) == 1


RESIDENT = """
import torch
from localgrad.measure.process_memory import resident_growth, storages_mapped

def step():
    first = torch.ones(2**24)  # 64 MiB
    del first
    torch.ones(2**23)

with storages_mapped():
    pass  # from here on the C library keeps tensors of up to 32 MiB in its heap
neighbours = [torch.ones(2**22) for _ in range(9)]
del neighbours[:8]  # leaves a hole that holds all of the step
with storages_mapped():
    step()
    print(min(resident_growth(step) for _ in range(5)))  # what the system pages in meanwhile only adds
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the high-water mark of a process")
def test_resident_memory_grows_by_what_a_step_holds() -> None:
    """In a process of its own: two holes in the heap of an old one would each keep a part of the step."""
    told = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    assert 0.98 * 2**26 <= int(told.stdout) <= 1.2 * 2**26


def test_methods_are_read_and_described() -> None:
    specs = [parse_method(text) for text in ["dgl+man", "[{dgl: {head: linear}}, man]"]]
    assert specs == [["dgl", "man"], [{"dgl": {"head": "linear"}}, "man"]]
    assert [described(spec) for spec in specs] == ["dgl+man", "dgl(head=linear)+man"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: Way("a", "local", methods.dgl(TASK), variant="fp16"), "did you mean 'fp32'|'bf16'"),
        (lambda: Way("a", "local", methods.dgl(TASK), variant="bf16+channel_last"), "did you mean 'channels_last'"),
        (lambda: standard_ways(TASK, [["e2e"]], [4]), "no auxiliary heads"),
        (lambda: parse_method("[dgl"), "is no YAML"),
        (lambda: contest("resnet8", [], **{**SETTINGS, "batch_size": 0}), "batch_size=0; it must be at least 1"),
        (lambda: contest("resnet8", [], **SETTINGS), "no ways"),
        (lambda: contest("resnet8", [Way("a", "local", methods.dgl(TASK), 99)], **SETTINGS), "99 blocks, but"),
    ],
)
def test_bad_input_is_refused(what: Any, message: str) -> None:
    with pytest.raises(LocalgradError, match=message):
        what()
