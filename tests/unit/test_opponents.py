"""Every way of `bench` that promises exact gradients has those of plain back-propagation."""

from __future__ import annotations

import copy
import shutil
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from localgrad import ConfigError, methods
from localgrad.measure.memory import measure, saved_storages
from localgrad.study.contest import _Contestant, contest
from localgrad.study.contest_report import Contest
from localgrad.study.ways import EIGHT_BIT, OFFLOADED, Way, standard_ways

TASK = localgrad.tasks.classification(10)
compiled = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler"
)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(8, 3, 8, 8, generator=generator, dtype=dtype),
        torch.randint(10, (8,), generator=generator),
    )


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return localgrad.models.resnet8().double().train()


class Layer(nn.Module):
    """A transformer's layer, through torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 48)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.mlp(x)


class Attention(nn.Module):
    """Patches and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, 2)
        self.layers = nn.Sequential(Layer(), Layer())
        self.read = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention().double().train()


def expected(model: nn.Module) -> list[Tensor]:
    x, y = batch()
    model = copy.deepcopy(model)
    nn.functional.cross_entropy(model(x), y).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def stepped(way: Way, model: nn.Module) -> list[Tensor]:
    """Gradients of one step, as each optimizer got them."""
    x, y = batch()
    contestant = _Contestant(way, copy.deepcopy(model), x, y, "count")
    before = {name: p.detach().clone() for name, p in contestant.network.model.named_parameters()}
    for optimizer in contestant.stepper.optimizers:
        optimizer.param_groups[0]["momentum"] = 0.0
        optimizer.param_groups[0]["lr"] = 1.0
    contestant.step()
    assert all(p.grad is None for p in contestant.network.parameters())
    return [before[name] - p.detach() for name, p in contestant.network.model.named_parameters()]


EXACT = [
    way
    for way in standard_ways(TASK, [], [3], parts=2, combinations=True)
    if not way.has("compile") and way.kind != "local" and way.optimizer == "SGD"
]


@pytest.mark.parametrize("make", [resnet, attention])
@pytest.mark.parametrize("way", EXACT, ids=lambda way: way.name)
def test_gradients_are_those_of_back_propagation(way: Way, make: Any) -> None:
    if way.method.micro_batches > 1 and make is resnet:
        pytest.skip("BatchNorm over micro-batches")
    model = make()
    for one, other in zip(stepped(way, model), expected(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@compiled
def test_compiled_gradients_are_those_of_back_propagation_and_a_budget_saves_less() -> None:
    """To 1e-10: the compiler fuses, and sums in another order. Both compile the same code, each anew."""
    body = [nn.Sequential(nn.Linear(192, 192), nn.GELU()) for _ in range(2)]
    model = nn.Sequential(nn.Flatten(), *body, nn.Linear(192, 10)).double()
    saved = []
    for budget in (0.0, 1.0):
        way = Way("c", "end-to-end", methods.e2e(TASK), variant="fp32+compile", budgets=(budget,))
        for one, other in zip(stepped(way, model), expected(model), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        network = _Contestant(way, model, *batch(), "count").network
        _, kept = saved_storages(lambda network=network: network.model(batch()[0]), network.parameters())
        saved.append(sum(kept.values()))
    assert saved[0] < saved[1]


def products(way: Way, model: nn.Module) -> int:
    """Convolutions that run forward in one step."""
    count = 0

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal count
            count += func is torch.ops.aten.convolution.default
            return func(*args, **(kwargs or {}))

    x, y = batch()
    contestant = _Contestant(way, copy.deepcopy(model), x, y, "count")
    with Counting():
        contestant.step()
    return count


def test_selective_checkpointing_runs_no_product_twice_and_keeps_more() -> None:
    model = resnet()
    plain, every, selective = (next(w for w in EXACT if w.name == name) for name in (
        "end-to-end", "checkpointing every unit", "checkpointing every unit, selective"
    ))  # fmt: skip
    once = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert products(plain, model) == products(selective, model) == once < products(every, model)
    found = contest("resnet8", [plain, every, selective], batch_size=8, image_size=16, num_classes=10, rounds=1)
    whole, least, between = (row.activation_bytes or 0 for row in found.rows)
    assert least < between < whole


def test_the_optimizer_in_the_backward_pass_frees_gradients_early() -> None:
    """At most the widest parameter's gradient is alive at once, beside the addends of one operation."""
    way = next(way for way in EXACT if way.in_backward)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(192, 192) for _ in range(6)), nn.Linear(192, 10))
    contestant = _Contestant(way, model, *batch(torch.float32), "count")
    contestant.step()
    memory = measure(contestant.step, contestant.network.parameters(), timeline=True)
    most = max(gradients for _, gradients in memory.timeline)
    assert 192 * 192 * 4 <= most <= 2 * 192 * 193 * 4


def test_offloading_is_left_out_on_a_cpu_with_the_reason() -> None:
    ways = [EXACT[0], next(way for way in EXACT if way.offload)]
    found = contest("resnet8", ways, batch_size=4, image_size=8, num_classes=10, rounds=1)
    assert len(found.rows) == 1 and "the host is the device" in found.skipped[0]


@compiled
def test_the_leanest_budget_is_named_and_other_ways_stay_uncompiled() -> None:
    e2e = methods.e2e(TASK)
    plain = Way("end-to-end", "end-to-end", e2e)
    swept = replace(plain, name="budget", variant="fp32+compile", budgets=(0.1, 0.7))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.GELU(), nn.Linear(32, 10))
    found = contest(model, [plain, swept], batch_size=4, image_size=8, num_classes=10, rounds=1)
    assert found.rows[1].name in ("budget 0.1", "budget 0.7") and found.rows[1].total_bytes is None
    assert model._compiled_call_impl is None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: Way("a", "end-to-end", methods.e2e(TASK), budgets=(0.5,)), r"fp32\+compile"),
    ],
)
def test_ways_that_cannot_be_are_refused(what: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        what()


PAIR = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))
WEIGHTS = 192 * 32 + 32 + 32 * 10 + 10  # of the pair; AdamW counts the steps of each tensor


def pair(*ways: Way) -> Contest:
    return contest(
        PAIR, [Way("e", "end-to-end", methods.e2e(TASK)), *ways], batch_size=4, image_size=8, num_classes=10, rounds=1
    )


def test_bytes_of_optimizer_state_are_counted() -> None:
    adam = Way("a", "end-to-end", methods.e2e(TASK), optimizer="AdamW")
    rows = pair(adam, replace(adam, in_backward=True), replace(adam, optimizer="Adagrad")).rows
    assert [row.weight_bytes for row in rows] == [4 * WEIGHTS] * 4
    steps = 4 * 4
    double = 2 * 4 * WEIGHTS + steps
    assert [row.state_bytes for row in rows] == [4 * WEIGHTS, double, double, 4 * WEIGHTS + steps]
    assert all(row.memory == row.weight_bytes + row.state_bytes + (row.total_bytes or 0) for row in rows)
    assert [row.label for row in rows] == ["e", "a, AdamW", "a, AdamW", "a, Adagrad"]


def test_local_rows_count_the_state_and_weights_of_heads() -> None:
    local = Way("d", "local", methods.dgl(TASK, head="linear"), 2, per_block=True, optimizer="AdamW")
    _, ours = pair(local).rows
    assert ours.auxiliary_parameters > 0
    parameters = WEIGHTS + ours.auxiliary_parameters
    assert ours.weight_bytes == 4 * parameters
    assert ours.state_bytes == 2 * 4 * parameters + 4 * 6


def test_8_bit_state_is_counted_with_its_scales_and_tables() -> None:
    """Its library keeps tensors of fewer than 4096 values in 32 bits."""
    pytest.importorskip("bitsandbytes")
    local = Way("d", "local", methods.dgl(TASK, head="linear"), 2, per_block=True, optimizer=EIGHT_BIT)
    rows = pair(Way("b", "end-to-end", methods.e2e(TASK), optimizer=EIGHT_BIT), local).rows
    large, small = 192 * 32, WEIGHTS - 192 * 32
    blocks = large // 256  # each with a scale in float32
    state = 2 * large + 2 * 4 * blocks + 2 * 4 * 256 + 2 * 4 * small
    assert rows[1].state_bytes == state < rows[0].state_bytes
    assert rows[2].state_bytes == state + 2 * 4 * rows[2].auxiliary_parameters
    assert rows[1].label == "b, AdamW8bit"


def test_offloaded_state_is_left_out_on_a_cpu_with_the_reason() -> None:
    pytest.importorskip("torchao")
    found = pair(Way("o", "end-to-end", methods.e2e(TASK), optimizer=OFFLOADED))
    assert len(found.rows) == 1
    assert "o, CPUOffloadOptimizer" in found.skipped[0] and "only supports CUDA" in found.skipped[0]


def test_a_missing_extra_is_left_out_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    ways = [replace(way, num_blocks=1) for way in standard_ways(TASK, [], []) if way.optimizer == EIGHT_BIT]
    found = pair(*ways)
    assert len(ways) == len(found.skipped) == 3 and len(found.rows) == 1
    assert all("pip install localgrad[eightbit]" in reason for reason in found.skipped)


def test_the_opponents_by_other_optimizers_are_given_to_local_rows_too() -> None:
    ways = standard_ways(TASK, [["dgl"]], [3])
    for optimizer in ("AdamW", EIGHT_BIT, OFFLOADED):
        kinds = [(way.kind, way.per_block) for way in ways if way.optimizer == optimizer]
        assert ("end-to-end", False) in kinds and ("local", True) in kinds
    assert any(way.in_backward and way.optimizer == EIGHT_BIT for way in ways)
    assert {way.optimizer for way in standard_ways(TASK, [["dgl"]], [3], combinations=False)} == {"SGD"}
