"""K = 1: every exported method is ordinary training of the model, bit for bit, or differs as it says."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from test_papers import CLASSES, TASK, data
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.methods import accumulation, dgl, logit_consistency, trgl

STEPS = 3
TAU, SHARE, PARTS = 10.0, 0.5, 4  # defaults of trgl, logit_consistency and accumulation


def built(name: str) -> localgrad.Method:
    """The method with its defaults, plug-ins over DGL."""
    make = getattr(localgrad.methods, name)
    first = next(iter(inspect.signature(make).parameters))
    if name == "feature_distillation":
        with torch.random.fork_rng():
            return make(TASK, teacher=localgrad.models.resnet20(CLASSES))
    return make(TASK) if first == "task" else make(dgl(TASK))


def start(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return localgrad.models.resnet8(CLASSES)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def by_library(method: localgrad.Method) -> list[Tensor]:
    """Weights and buffers after three steps in one block."""
    model, images, targets = start(), data()[1].float(), data()[2]
    network = localgrad.localize(model, method, 1, example=images)
    assert network.num_blocks == 1 and not list(network.auxiliary.parameters())
    optimizer = sgd(model)
    for step in range(STEPS):
        for _, loss in localgrad.local_losses(network, images, targets, step):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        localgrad.exchange(network)
    return [*model.parameters(), *model.buffers()]


def by_hand(objective: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None) -> list[Tensor]:
    """The same with plain PyTorch; ``objective`` is cross-entropy unless given."""
    model, images, targets = start(), data()[1].float(), data()[2]
    optimizer = sgd(model)
    for _ in range(STEPS):
        loss = F.cross_entropy(model(images), targets) if objective is None else objective(model, images, targets)
        if loss.requires_grad:  # else the objective has back-propagated by itself
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [*model.parameters(), *model.buffers()]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# What these do at K = 1 is their own and is asserted below.
OTHERWISE = {"accumulation", "trgl", "logit_consistency"}


@pytest.mark.parametrize("name", [name for name in localgrad.methods.__all__ if name not in OTHERWISE])
def test_one_block_is_end_to_end_bit_for_bit(name: str) -> None:
    assert same(by_library(built(name)), by_hand())


def test_accumulation_is_a_loop_over_micro_batches() -> None:
    def in_parts(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        for x, y in zip(images.chunk(PARTS), targets.chunk(PARTS), strict=True):
            (F.cross_entropy(model(x), y) / PARTS).backward()
        return torch.zeros(())

    assert same(by_library(built("accumulation")), by_hand(in_parts))
    assert same(by_library(accumulation(dgl(TASK), parts=1)), by_hand())


def test_trgl_adds_the_energy_of_the_whole_network() -> None:
    """``CE + 1 / (2 tau) * sum of mean(bn2 ** 2)``; one block is the first half."""

    def transported(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        energies: list[Tensor] = []
        hooks = [
            stage[0].bn2.register_forward_hook(lambda _, __, output: energies.append((output**2).mean()))
            for stage in (model.layer1, model.layer2, model.layer3)
        ]
        logits = model(images)
        for hook in hooks:
            hook.remove()
        assert len(energies) == 3
        return F.cross_entropy(logits, targets) + sum(energies) / (2 * TAU)

    ours, theirs = by_library(built("trgl")), by_hand(transported)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(ours, by_hand(), strict=True))
    free = by_library(trgl(dgl(TASK), tau=1e30))
    assert same(free, by_hand())


def test_logit_consistency_draws_the_model_to_the_uniform_belief() -> None:
    """``share * CE + (1 - share) * KL(p || uniform)``: the model's own loss has no block before it."""

    def drawn(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        logits = model(images)
        p = logits.softmax(1)
        divergence = (p * (p.log() + torch.log(torch.tensor(float(CLASSES))))).sum(1).mean()
        return SHARE * F.cross_entropy(logits, targets) + (1 - SHARE) * divergence

    ours, theirs = by_library(built("logit_consistency")), by_hand(drawn)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(ours, by_hand(), strict=True))
    assert same(by_library(logit_consistency(dgl(TASK), share=1.0)), by_hand())


def test_the_comparison_can_fail() -> None:
    ours = by_library(localgrad.methods.e2e(TASK))
    other = copy.deepcopy(ours)
    other[0].data.view(-1)[0] += 1e-6
    assert same(ours, by_hand()) and not same(ours, other)
