"""PGL: period 1 is end-to-end training, an infinite period its base, and guided steps come when they should."""

from __future__ import annotations

import pytest
import torch
from test_papers import TASK, data

import localgrad
from localgrad.methods import dgl, e2e, pgl, windows
from localgrad.spans import Local, Periodic, Span


def trained(method: localgrad.Method, steps: int = 4) -> list[torch.Tensor]:
    """Weights of the model after some steps of SGD with momentum and weight decay, from the same start."""
    torch.manual_seed(0)
    model = localgrad.models.resnet8(TASK.num_classes)
    images, targets = data()[1].float(), data()[2]
    torch.manual_seed(1)
    network = localgrad.localize(model, method, num_blocks=3, example=images)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.05, 0.9, weight_decay=1e-2)
    for step in range(steps):
        localgrad.backward(network, images, targets, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [p.detach() for p in model.parameters()] + list(model.buffers())


@pytest.mark.parametrize("base", [dgl(TASK), windows(dgl(TASK))], ids=lambda m: m.name)
def test_period_one_is_end_to_end_bit_for_bit(base: localgrad.Method) -> None:
    pairs = zip(trained(pgl(base, every=1)), trained(e2e(TASK)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_before_the_first_guided_step_it_is_its_base_bit_for_bit() -> None:
    pairs = zip(trained(pgl(dgl(TASK), start=10**9)), trained(dgl(TASK)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_guided_step_changes_the_result_and_leaves_the_heads_alone() -> None:
    ours, base = trained(pgl(dgl(TASK), every=2)), trained(dgl(TASK))
    assert not any(torch.equal(a, b) for a, b in zip(ours, base, strict=True) if a.dim() == 4)
    network = localgrad.localize(
        localgrad.models.resnet8(TASK.num_classes), pgl(dgl(TASK), every=2), num_blocks=3, example=data()[1].float()
    )
    localgrad.backward(network, data()[1].float(), data()[2], step=0)
    assert all(p.grad is None for p in network.auxiliary.parameters())
    assert all(p.grad is not None for p in network.model.parameters())
    localgrad.backward(network, data()[1].float(), data()[2], step=1)
    assert all(p.grad is not None for p in network.auxiliary.parameters())


def test_guided_steps() -> None:
    schedule = Periodic(Local(), every=5, duration=2, start=3)
    assert [step for step in range(20) if schedule.guided(step)] == [3, 4, 8, 9, 13, 14, 18, 19]
    assert schedule(4, 3) == (Span(0, 4),) and schedule(4, 5) == Local()(4, 5)
    assert Periodic(Local(), every=1).patterns(4) == ((Span(0, 4),),)
    for wrong in ({"every": 0}, {"duration": 11}, {"duration": 0}, {"start": -1}):
        with pytest.raises(localgrad.MethodError, match="duration"):
            pgl(dgl(TASK), **wrong)
