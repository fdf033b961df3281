"""Every method trains tasks of numbers, of several labels, and from a loss alone, or says why it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import localgrad
from localgrad.task import Task
from localgrad.tasks import custom, multilabel, regression
from localgrad.testing import assert_isolated
from zoo import CLASSES, bases, batch, build, composed

NORMALISED = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
TASKS: dict[str, Task] = {
    "regression": regression(CLASSES, **NORMALISED),
    "multilabel": multilabel(CLASSES, **NORMALISED),
    "custom": custom(F.huber_loss, CLASSES, **NORMALISED),
}
METHODS = {
    (task, name): method
    for task, value in TASKS.items()
    for name, method in composed(bases(value))[0].items()
    if "(" not in name or name.endswith("(dgl)")
}
WITHOUT_CLASSES = [key for key in METHODS if "predsim" in key[1] and key[0] != "multilabel"]


def given() -> tuple[Tensor, Tensor]:
    images, classes = batch()
    targets = F.one_hot(classes, CLASSES).float()
    targets[:, 0] = 1.0
    return images, targets


@pytest.mark.parametrize("key", [key for key in METHODS if key not in WITHOUT_CLASSES], ids="-".join)
def test_every_method_trains(key: tuple[str, str]) -> None:
    network = build("residual", METHODS[key], 3)
    inputs, targets = given()
    for step in range(2):
        localgrad.backward(network, inputs, targets, step)
        localgrad.exchange(network)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.model.parameters())
    assert_isolated(network, inputs, targets, 0)


@pytest.mark.parametrize("key", WITHOUT_CLASSES, ids="-".join)
def test_what_needs_classes_says_so(key: tuple[str, str]) -> None:
    with pytest.raises(localgrad.TrainingError, match="one class for each image"):
        localgrad.backward(build("residual", METHODS[key], 3), *given())


@pytest.mark.parametrize("task", TASKS)
def test_the_contrastive_loss_says_so_too(task: str) -> None:
    method = localgrad.methods.infopro(TASKS[task], loss="contrast")
    inputs, targets = given()
    with pytest.raises(localgrad.TrainingError, match="numbers and several labels are none"):
        localgrad.backward(build("residual", method, 3), inputs, targets)


def test_labels_that_are_ignored_take_no_part_in_losses_of_pairs() -> None:
    """Similarity matching and the contrastive loss are those of the other samples."""
    task = localgrad.tasks.classification(CLASSES)
    rows, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, -100, 1, 0, -100, 1])
    kept = labels >= 0
    for loss in (localgrad.losses.Similarity(task), localgrad.losses.Contrastive()):
        leaf = rows.clone().requires_grad_()
        value = loss(leaf, localgrad.Batch(None, labels, 0))
        value.backward()
        alone = rows[kept].requires_grad_()
        expected = loss(alone, localgrad.Batch(None, labels[kept], 0))
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        assert leaf.grad is not None and not leaf.grad[~kept].any()
        torch.testing.assert_close(leaf.grad[kept], alone.grad, rtol=1e-12, atol=1e-12)
