"""Parts and replicas of any size and value: their weighted losses sum to the loss of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from localgrad.balance import Balance
from localgrad.task import Batch, Task
from localgrad.tasks import classification, segmentation

SMALL = settings(max_examples=80, deadline=None, derandomize=True)
CLASSES = 3


@st.composite
def splits(draw: st.DrawFn) -> list[list[int]]:
    """Sizes of the parts of each replica; none is empty."""
    return draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3))


def summed(task: Task, outputs: Tensor, targets: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """As engine and replicas do: each part weighted by its samples, and by what its loss divides by."""
    rows = [sum(replica) for replica in sizes]
    x, y = outputs.split(rows), targets.split(rows)
    total = outputs.new_zeros(())
    for rank, replica in enumerate(sizes):

        def joined(_: Tensor) -> Tensor:
            return torch.stack([task.counted(targets).double() for targets in y])

        several = len(sizes) > 1
        balance = Balance(y[rank], sum(rows) if several else rows[rank], joined if several else None)
        for inputs, part in zip(x[rank].split(replica), y[rank].split(replica), strict=True):
            batch = Batch(inputs, part, 0, balance=balance.of(part, len(inputs)))
            total = total + task.loss(inputs, batch) * len(inputs) / sum(rows)
    return total


def check(task: Any, outputs: Tensor, targets: Tensor, sizes: Sequence[Sequence[int]]) -> None:
    outputs.requires_grad_()
    whole = task.loss(outputs, Batch(outputs, targets, 0))
    ours = summed(task, outputs, targets, sizes)
    expected, found = (torch.autograd.grad(loss, outputs)[0] for loss in (whole, ours))
    for value, other in ((whole, ours), (expected, found)):
        assert value.isfinite().all() and other.isfinite().all()
        assert (value - other).abs().max() <= 1e-12 * max(1.0, float(value.detach().abs().max()))
    if not task.counted(targets).any():
        assert not whole.any() and not expected.any()


def weights(smoothing: float) -> st.SearchStrategy[tuple[float, ...] | None]:
    """Of each class; a smoothed loss takes none of 0."""
    one = st.floats(1e-3, 1e3) if smoothing else st.just(0.0) | st.floats(1e-3, 1e3)
    several = st.tuples(*[one] * CLASSES).filter(any)
    return st.none() | several


@given(splits(), st.data())
@SMALL
def test_labels(sizes: list[list[int]], data: st.DataObject) -> None:
    """Of any weight, smoothed or not, some of them ignored."""
    count, smoothing = sum(map(sum, sizes)), data.draw(st.sampled_from([0.0, 0.1]))
    task = classification(CLASSES, label_smoothing=smoothing, class_weights=data.draw(weights(smoothing)))
    targets = data.draw(st.lists(st.sampled_from([-100, 0, 1, 2]), min_size=count, max_size=count))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    check(task, torch.randn(count, CLASSES, dtype=torch.float64), torch.tensor(targets), sizes)


@given(splits(), st.integers(0, 99), st.sampled_from([0.0, 0.2]))
@SMALL
def test_soft_labels(sizes: list[list[int]], seed: int, smoothing: float) -> None:
    count = sum(map(sum, sizes))
    torch.manual_seed(seed)
    targets = torch.rand(count, CLASSES, dtype=torch.float64).softmax(1)
    task = classification(CLASSES, label_smoothing=smoothing)
    check(task, torch.randn(count, CLASSES, dtype=torch.float64), targets, sizes)


@given(splits(), st.data())
@SMALL
def test_masks(sizes: list[list[int]], data: st.DataObject) -> None:
    """Pixels of which any share counts in a part, or none."""
    count, smoothing = sum(map(sum, sizes)), data.draw(st.sampled_from([0.0, 0.1]))
    task = segmentation(CLASSES, label_smoothing=smoothing, class_weights=data.draw(weights(smoothing)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    shares = data.draw(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=count, max_size=count))
    counts = torch.rand(count, 4, 4) < torch.tensor(shares)[:, None, None]
    targets = torch.randint(CLASSES, (count, 4, 4)).where(counts, 255)
    check(task, torch.randn(count, CLASSES, 4, 4, dtype=torch.float64), targets, sizes)


@given(splits(), st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=48, max_size=48), st.sampled_from([0.0, 1.0]))
@example([[1, 2], [3]], [0.0] * 48, 0.0)
@example([[1, 2], [3]], [0.0] * 48, 1.0)
@SMALL
def test_factors(sizes: list[list[int]], values: list[float], least: float) -> None:
    """``sum_i factor_i * samples_i / samples * loss_i`` for ``loss_i = sum of part i / max(its count, least)``."""
    rows = [sum(replica) for replica in sizes]
    counts = torch.tensor(values[: sum(rows)], dtype=torch.float64)
    torch.manual_seed(0)
    sums = torch.randn(len(counts), dtype=torch.float64) * counts
    of_replicas = counts.split(rows)
    totals = torch.stack([replica.sum() for replica in of_replicas])
    found = torch.zeros((), dtype=torch.float64)
    for rank, replica in enumerate(sizes):
        balance = Balance(of_replicas[rank], sum(rows), lambda _: totals)
        parts = zip(of_replicas[rank].split(replica), sums.split(rows)[rank].split(replica), strict=True)
        for part, value in parts:
            factor = balance.of(part, len(part))(torch.sum, "all", least)
            loss = value.sum() / part.sum().clamp(min=least) if part.any() else value.sum()
            found = found + factor * loss * len(part) / sum(rows)
    # Where a denominator has a least value, the whole one is the sum of the replicas', which is what is compared.
    expected = sums.sum() / counts.sum().clamp(min=least) if counts.any() else sums.sum()
    assert (found - expected).abs() <= 1e-12 * max(1.0, float(sums.abs().sum() / counts.sum().clamp(min=1e-300)))
