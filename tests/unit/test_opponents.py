"""What `bench` sets against local learning has the gradients of back-propagation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.errors import MethodError
from localgrad.study.contest import Way, contest, standard_ways
from localgrad.study.opponents import compiler, offloaded, selective, step_in_backward

TASK = localgrad.tasks.classification(10)


def model() -> nn.Module:
    torch.manual_seed(0)
    return localgrad.models.resnet8().double()


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=draw), torch.arange(6)


def gradients(network: nn.Module) -> list[Tensor]:
    x, y = batch()
    F.cross_entropy(network(x), y).backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def test_selective_checkpointing_is_exact() -> None:
    plain, lean = model(), model()
    selective(lean, batch()[0][:2])
    assert "checkpoint" in str(lean).lower()
    for found, expected in zip(gradients(lean), gradients(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_offloading_needs_a_device() -> None:
    with pytest.raises(MethodError, match="on a CPU there is no other memory"):
        offloaded(model(), batch()[0])
    ways = standard_ways(TASK, [["dgl"]], [2], combinations=False)
    found = contest("resnet8", ways, batch_size=4, image_size=16, num_classes=10, rounds=1)
    assert any("on the host" in reason for reason in found.skipped)
    names = {row.name: row.gradients for row in found.rows}
    assert names["checkpointing every unit, products kept"] == names["optimizer in the backward pass"] == "exact"


def test_steps_in_the_backward_pass_are_those_after_it() -> None:
    plain, stepping = model(), model()
    step_in_backward(list(stepping.parameters()))
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(3):
        assert not gradients(stepping)  # gone as soon as they were there
        gradients(plain)
        optimizer.step()
        optimizer.zero_grad()
    for found, expected in zip(stepping.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_modules_without_units_are_left_alone() -> None:
    with pytest.raises(MethodError, match="no units"):
        selective(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(2, 3, 2, 2))


@pytest.mark.filterwarnings("ignore")
def test_each_compiled_way_has_its_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled for one contestant is not handed to the next one, whose modules are alike."""
    from torch._functorch import config

    seen: list[float] = []

    def compiled(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        seen.append(config.activation_memory_budget)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compiled)
    e2e = localgrad.methods.e2e(TASK)
    ways = [Way("e", "end-to-end", e2e)]
    ways += [Way(f"b{b}", "checkpointing", e2e, variant="fp32+compile", budget=b) for b in (None, 0.3, 0.7)]
    contest("resnet8", ways, batch_size=4, image_size=16, num_classes=10, rounds=1)
    assert set(seen) == {1.0, 0.3, 0.7}
    assert compiler(0.3) is not compiler(0.3)
