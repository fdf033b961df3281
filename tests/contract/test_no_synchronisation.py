"""Nothing inside an epoch waits for the device: steps run on the meta device, which has no numbers to read back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import localgrad
from localgrad import data
from localgrad.config import OptimConfig
from localgrad.method import Term
from localgrad.spans import Span
from localgrad.train.meters import Meter
from localgrad.train.optim import Stepper
from zoo import METHODS, batch, build, steps

META = torch.device("meta")


# The teacher of feature distillation is a module of its own, which stays on the CPU.
ON_ONE_DEVICE = [name for name in METHODS if name != "feature_distillation"]


@pytest.mark.parametrize(
    ("name", "per_block"), [*((name, False) for name in ON_ONE_DEVICE), ("dgl", True), ("mlaan(dgl)", True)]
)
def test_a_step_reads_nothing_back(name: str, per_block: bool) -> None:
    network = build("residual", METHODS[name], 4)
    numbers = steps(network, limit=12)
    network.to(META)
    stepper = Stepper(network, OptimConfig(per_block=per_block), torch.amp.GradScaler("cpu", enabled=False))
    meter = Meter(network)
    inputs, targets = (tensor.to(META) for tensor in batch())

    def observe(span: Span, term: Term | None, output: Any) -> None:
        meter.add_output(span, term, output, targets[: len(output)])

    with localgrad.keyed_randomness(0):
        for step in numbers:
            losses = localgrad.local_losses(
                network, inputs, targets, step, on_output=observe, on_block_done=stepper.block_done
            )
            for span, loss in losses:
                loss.backward()
                meter.add_loss(span, loss)
            meter.add_up()
            stepper.finish(step)
            localgrad.exchange(network)
            meter.end_batch()
    with pytest.raises((RuntimeError, NotImplementedError)):  # or nothing would be tested
        meter.read()


class FromTheHost(TorchDispatchMode):
    """Refuses ``torch.tensor(numbers)``: on CUDA it is copied there, which is waited for and cannot be captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor is made from numbers of the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_copies_no_numbers_to_the_device(name: str) -> None:
    network = build("residual", METHODS[name], 4)
    numbers = steps(network, limit=12)
    inputs, targets = batch()
    for step in numbers:
        localgrad.backward(network, inputs, targets, step)
    with FromTheHost():
        with pytest.raises(AssertionError, match="numbers of the host"):  # or nothing would be tested
            torch.tensor(1.0)
        for step in numbers:
            localgrad.backward(network, inputs, targets, step)


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (localgrad.tasks.classification(4, class_weights=(1.0, 2.0, 3.0, 4.0)), torch.arange(8) % 4),
        (localgrad.tasks.classification(4), torch.full((8, 4), 0.25)),
        (localgrad.tasks.multilabel(4), torch.ones(8, 4)),
        (localgrad.tasks.regression(4), torch.ones(8, 4)),
    ],
    ids=["weighted", "mixed", "multilabel", "regression"],
)
def test_a_loss_in_parts_copies_no_numbers_to_the_device(task: localgrad.task.Task, targets: torch.Tensor) -> None:
    network = build("residual", localgrad.methods.accumulation(localgrad.methods.dgl(task), parts=2), 4)
    localgrad.backward(network, batch()[0], targets)
    with FromTheHost():
        localgrad.backward(network, batch()[0], targets)


class Copies(TorchDispatchMode):
    """Counts tensors that are moved to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and any(
            isinstance(a, torch.Tensor) and a.device != result.device for a in args
        ):
            self.count += 1
        return result


def test_a_resident_split_moves_indices_and_draws_once_an_epoch() -> None:
    loader: Any = data.load("digits", batch_size=64).train
    assert loader.crop is not None
    away = dataclasses.replace(loader, images=loader.images.to(META), targets=loader.targets.to(META))
    next(away.epoch(0))  # makes the constants of the normalisation
    with Copies() as copies:
        batches = list(away.epoch(1))
    assert len(batches) == len(loader) > 10
    assert copies.count == 2
    for (inputs, targets), (x, y) in zip(batches, loader.epoch(1), strict=True):
        assert inputs.device == targets.device == META and (inputs.shape, targets.shape) == (x.shape, y.shape)
