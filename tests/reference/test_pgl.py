"""PGL: period 1 is end-to-end training, an infinite period its base, and guided steps come when they should."""

from __future__ import annotations

import copy

import pytest
import torch
from test_man import buffers_kept, train_both
from test_papers import CLASSES, TASK, copied, data, segments
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.methods import dgl, e2e, infopro, last_head_distillation, mlaan, pgl, predsim, windows
from localgrad.spans import Local, Periodic, Span


def trained(method: localgrad.Method, steps: int = 4) -> list[torch.Tensor]:
    """Weights of the model after some steps of SGD with momentum and weight decay, from the same start."""
    torch.manual_seed(0)
    model = localgrad.models.resnet8(TASK.num_classes)
    images, targets = data()[1].float(), data()[2]
    torch.manual_seed(1)
    network = localgrad.localize(model, method, 3, example=images)
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
        localgrad.models.resnet8(TASK.num_classes), pgl(dgl(TASK), every=2), 3, example=data()[1].float()
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


# --- guidance by distillation ------------------------------------------------------------------------------------


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T ** 2 * KL(softmax(teacher / T) || softmax(student / T))``, sample by sample and class by class."""
    total = student.new_zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        p, q = torch.exp(theirs / temperature), torch.exp(ours / temperature)
        p, q = p / p.sum(), q / q.sum()
        for c in range(CLASSES):
            total = total + p[c] * (torch.log(p[c]) - torch.log(q[c]))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("every, weight, temperature", [(1, 0.3, 4.0), (2, 0.5, 2.0)])
def test_three_steps_of_distillation(every: int, weight: float, temperature: float) -> None:
    """A forward of the current weights without gradient and without moving BatchNorm, then the local pass."""
    torch.manual_seed(0)
    model = localgrad.models.resnet8(CLASSES).double()
    _, images, targets = data()
    method = last_head_distillation(
        dgl(TASK, head=localgrad.heads.Linear(CLASSES)),
        every=every,
        weight=weight,
        temperature=temperature,
    )
    network = localgrad.localize(model, method, ("layer2", "layer3"), example=images)
    assert [str(span) for span in network.spans(0)] == ["(0, 1)", "(1, 2)", "(2, 3)"]
    bare = copy.deepcopy(model)
    library = list(network.auxiliary.values())
    own = [copied(nn.Linear(width, CLASSES), aux) for width, aux in zip((16, 32), library, strict=True)]
    guided = []

    def step(index: int) -> None:
        teacher = None
        if index % every == 0:
            guided.append(index)
            with torch.no_grad(), buffers_kept(bare):
                teacher = images
                for segment in segments(bare):
                    teacher = segment(teacher)
        x = images
        for k, segment in enumerate(segments(bare)):
            x = segment(x)
            logits = x if k == 2 else own[k](x.mean((2, 3)))
            loss = F.cross_entropy(logits, targets)
            if k < 2 and teacher is not None:
                loss = (1 - weight) * loss + weight * soft_targets(logits, teacher, temperature)
            loss.backward()
            x = x.detach()

    train_both(network, bare, own, library, step)
    assert guided == list(range(0, 3, every))


@pytest.mark.parametrize("base", [dgl(TASK), infopro(TASK), predsim(TASK), windows(dgl(TASK))], ids=lambda m: m.name)
def test_distillation_of_weight_0_is_its_base_bit_for_bit(base: localgrad.Method) -> None:
    theirs = trained(base)
    ours = trained(last_head_distillation(base, every=2, weight=0.0))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    guided = trained(last_head_distillation(base, every=2, weight=0.5))
    assert not all(torch.equal(a, b) for a, b in zip(guided, theirs, strict=True))


def test_distillation_moves_batchnorm_once() -> None:
    """Once a step, and as the base does: the first step's statistics know nothing of the teacher's pass."""
    images, targets = data()[1].float(), data()[2]
    found = []
    for method in (last_head_distillation(dgl(TASK), every=1), dgl(TASK)):
        torch.manual_seed(0)
        model = localgrad.models.resnet8(CLASSES)
        network = localgrad.localize(model, method, 3, example=images)
        localgrad.backward(network, images, targets)
        found.append({name: b.clone() for name, b in model.named_buffers()})
    assert all(count == 1 for name, count in found[0].items() if name.endswith("num_batches_tracked"))
    assert all(torch.equal(b, found[1][name]) for name, b in found[0].items())


def test_heads_without_logits_cannot_be_distilled() -> None:
    with pytest.raises(localgrad.MethodError, match="use softmax instead of contrastive heads"):
        last_head_distillation(infopro(TASK, loss="contrast"))
    pgl(infopro(TASK, loss="contrast"))  # guidance by back-propagation needs no heads
    with pytest.raises(localgrad.MethodError, match="no auxiliary heads"):
        last_head_distillation(e2e(TASK))
    for wrong in ({"weight": 1.5}, {"weight": -0.1}, {"temperature": 0.0}):
        with pytest.raises(localgrad.MethodError, match="temperature"):
            last_head_distillation(dgl(TASK), **wrong)


# --- the clock ---------------------------------------------------------------------------------------------------


def test_the_clock_of_distillation() -> None:
    (teacher,) = last_head_distillation(dgl(TASK), every=3).contexts
    assert [teacher.schedule.guided(step) for step in range(7)] == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("base", [windows(dgl(TASK)), mlaan(dgl(TASK))], ids=lambda m: m.name)
def test_an_infinite_period_is_its_base_bit_for_bit(base: localgrad.Method) -> None:
    """Never guided; with start=0 the very first step is, and it alone."""
    theirs = trained(base)
    ours = trained(pgl(base, start=10**6, every=10**9))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [len(pgl(base, every=10**9).spans(3, step)) == 1 for step in range(4)] == [True, False, False, False]


@pytest.mark.parametrize("base", [mlaan(dgl(TASK)), infopro(TASK)], ids=lambda m: m.name)
def test_guided_always_is_end_to_end_bit_for_bit(base: localgrad.Method) -> None:
    for options in ({"every": 1}, {"every": 5, "duration": 5}):
        pairs = zip(trained(pgl(base, **options)), trained(e2e(TASK)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
