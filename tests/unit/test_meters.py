"""Losses and scores of heads, summed once a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import localgrad
from localgrad.errors import TrainingError
from localgrad.method import Term
from localgrad.spans import Span
from localgrad.tasks import classification, custom, multilabel, regression
from localgrad.train.meters import Meter

ROWS = torch.Generator().manual_seed(0)


def meter_of(task: Any, **accumulation: Any) -> tuple[localgrad.LocalNetwork, Meter]:
    torch.manual_seed(0)
    width = task.num_outputs
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, width))
    method = localgrad.methods.dgl(task, head="linear")
    if accumulation:
        method = localgrad.methods.accumulation(method, **accumulation)
    network = localgrad.localize(model, method, 2, example=torch.randn(4, 4)).train()
    return network, Meter(network)


TASKS: dict[str, tuple[Any, Any]] = {
    "classification": (classification(3), torch.tensor([0, 1, 2, -100, 1, 0, 2])),
    "multilabel": (multilabel(3), torch.randint(-1, 2, (7, 3), generator=ROWS).float()),
    "regression": (regression(3), torch.randn(7, 3, generator=ROWS)),  # scores rows against their batch
    "custom": (
        custom(lambda output, targets: (output - targets).square().mean(), 3),
        torch.randn(7, 3, generator=ROWS),
    ),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("parts", [1, 3])  # parts of 2 and 3 samples
def test_sums_are_those_of_each_head_alone(name: str, parts: int) -> None:
    task, targets = TASKS[name]
    network, meter = meter_of(task, parts=parts)
    losses: dict[str, float] = {}
    scores: dict[str, float] = {}
    seen: dict[str, int] = {}

    def observe(span: Span, term: Term | None, output: Tensor) -> None:
        key = meter.name(span)
        rows = targets[seen.get(key, 0) : seen.get(key, 0) + len(output)]
        seen[key] = seen.get(key, 0) + len(output)
        meter.add_output(span, term, output, rows)
        scores[key] = scores.get(key, 0.0) + task.score(output, rows).double().sum().item()

    for step in range(2):
        seen.clear()
        x = torch.randn(7, 4, generator=ROWS)
        for span, loss in localgrad.local_losses(network, x, targets, step, on_output=observe):
            loss.backward()
            meter.add_loss(span, loss)
            losses[meter.name(span)] = losses.get(meter.name(span), 0.0) + loss.double().item()
        meter.add_up()
        meter.end_batch()
    state = meter.state_dict()
    assert set(losses) == set(scores) == {"block 1", "model"}
    assert state["losses"] == losses and state["scores"] == scores
    assert state["samples"] == {"block 1": 14, "model": 14} and state["batches"] == {"block 1": 2, "model": 2}
    assert meter.read()["loss"] == {key: total / 2 for key, total in losses.items()}


def test_a_loss_that_is_no_number_is_named_and_a_reset_forgets_it() -> None:
    _, meter = meter_of(classification(3))
    meter.add_loss(Span(0, 1), torch.tensor(1.0))
    meter.add_loss(Span(1, 2), torch.tensor(float("nan")))
    meter.add_up()
    with pytest.raises(TrainingError, match="the loss of model is nan at step 7"):
        meter.check_finite(7)
    sums = meter.losses
    meter.reset()
    meter.check_finite(8)
    assert meter.losses is sums  # a captured step adds to the same tensors


def test_what_targets_alone_say_is_found_once_for_these_targets() -> None:
    asked = []

    def count(targets: Tensor) -> int:
        asked.append(targets)
        return len(targets)

    batch = localgrad.Batch(None, torch.zeros(3), 0)
    assert [batch.of_targets("count", count) for _ in range(3)] == [3, 3, 3] and len(asked) == 1
    assert dataclasses.replace(batch, boundary=2).of_targets("count", count) == 3 and len(asked) == 1
    assert dataclasses.replace(batch, targets=torch.zeros(5)).of_targets("count", count) == 5
    assert batch.of_targets("another", len) == 3
