"""Every way of `bench` that promises exact gradients has those of plain back-propagation."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from localgrad import ConfigError, methods
from localgrad.measure.memory import measure, saved_storages
from localgrad.study.contest import _Contestant, contest
from localgrad.study.ways import Way, standard_ways

TASK = localgrad.tasks.classification(10)
RATE = 1e-3  # of the optimizer of a contest, whose first step is -RATE * gradient
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
    for optimizer in contestant.optimizers:
        assert optimizer is not None
        optimizer.param_groups[0]["momentum"] = 0.0
        optimizer.param_groups[0]["lr"] = 1.0
    contestant.step()
    assert all(p.grad is None for p in contestant.network.parameters())
    return [before[name] - p.detach() for name, p in contestant.network.model.named_parameters()]


EXACT = [
    way
    for way in standard_ways(TASK, [], [3], parts=2, combinations=True)
    if not way.has("compile") and way.kind != "local"
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
    memory = measure(contestant.step, contestant.trained, timeline=True)
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
        (
            lambda: Way("a", "b", methods.accumulation(methods.e2e(TASK), parts=2), in_backward=True),
            "2 micro-batches",
        ),
    ],
)
def test_ways_that_cannot_be_are_refused(what: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        what()
