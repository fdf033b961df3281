"""What localgrad is for: peak activation bytes of one step fall with the number of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import localgrad
from localgrad import cuts
from localgrad.config import OptimConfig
from localgrad.measure.memory import LiveBytes, Memory, measure
from localgrad.method import Method
from localgrad.train.optim import Stepper

TASK = localgrad.tasks.classification(10)


def peak(method: Method, cutting: Any, example_size: int = 2) -> int:
    torch.manual_seed(0)
    model = localgrad.models.resnet32().train()
    inputs, targets = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    network = localgrad.localize(model, method, cutting, example=inputs[:example_size])
    return measure(lambda: localgrad.backward(network, inputs, targets), network.parameters()).peak_activations


def test_blocks_keep_a_fraction_of_the_activations(record_property: Callable[[str, object], None]) -> None:
    dgl, e2e = localgrad.methods.dgl(TASK), localgrad.methods.e2e(TASK)
    whole = peak(e2e, 1)
    share = {
        "16 dgl blocks": peak(dgl, 16) / whole,
        "8 byte-balanced dgl blocks": peak(dgl, cuts.by_bytes(8)) / whole,
        "8 byte-balanced dgl blocks, example as large as the batch": peak(dgl, cuts.by_bytes(8), 64) / whole,
        "8 byte-balanced dgl blocks, gradients weighed": peak(dgl, cuts.by_bytes(8, batch_size=64)) / whole,
        "checkpointing(e2e), 16 blocks": peak(localgrad.methods.checkpointing(e2e), 16) / whole,
    }
    for name, value in share.items():
        record_property(name, round(value, 3))
        print(f"{name}: {value:.3f} of end-to-end")
    assert share["16 dgl blocks"] <= 0.20
    assert share["8 byte-balanced dgl blocks"] <= 0.22
    assert share["8 byte-balanced dgl blocks, example as large as the batch"] <= 0.22
    assert share["8 byte-balanced dgl blocks, gradients weighed"] <= 0.22
    assert share["16 dgl blocks"] < share["checkpointing(e2e), 16 blocks"] <= 0.35


def trained(method: Method, num_blocks: int, per_block: bool, lean: bool) -> Memory:
    """Bytes of a whole training step; ``lean`` is bf16 and channels_last."""
    torch.manual_seed(0)
    memory_format = torch.channels_last if lean else torch.contiguous_format
    inputs, targets = torch.randn(8, 3, 32, 32).contiguous(memory_format=memory_format), torch.arange(8)
    network = localgrad.localize(localgrad.models.resnet32(), method, num_blocks, example=inputs[:2]).train()
    network.to(memory_format=memory_format)
    config = OptimConfig(per_block=per_block, momentum=0.0)  # momentum is optimizer state, which does not count
    stepper = Stepper(network, config, torch.amp.GradScaler("cpu", enabled=False))

    def step() -> None:
        autocast = torch.bfloat16 if lean else None
        losses = localgrad.local_losses(network, inputs, targets, autocast=autocast, on_block_done=stepper.block_done)
        for _, loss in losses:
            loss.backward()
        stepper.finish(0)

    return measure(step, network.parameters())


def test_bf16_channels_last_and_a_step_per_block_keep_a_tenth(record_property: Callable[[str, object], None]) -> None:
    whole = trained(localgrad.methods.e2e(TASK), 1, per_block=False, lean=False)
    lean = trained(localgrad.methods.dgl(TASK), 16, per_block=True, lean=True)
    record_property("activations", round(lean.peak_activations / whole.peak_activations, 4))
    record_property("with gradients", round(lean.peak_total / whole.peak_total, 4))
    assert lean.peak_activations <= 0.10 * whole.peak_activations
    assert lean.peak_total <= 0.10 * whole.peak_total


def test_a_boundary_exists_once_when_it_is_handed_over() -> None:
    """When a block is done, nothing is alive but the features that the next one reads, and scalars and logits."""
    torch.manual_seed(0)
    model, inputs = localgrad.models.resnet20().train(), torch.randn(4, 3, 32, 32)
    network = localgrad.localize(model, localgrad.methods.dgl(TASK), 5, example=inputs)
    found: list[int] = []
    with LiveBytes() as tracker:

        def done(block: int) -> None:
            for parameter in network.block_parameters(block):
                parameter.grad = None
            found.append(tracker.current)

        for _, loss in localgrad.local_losses(network, inputs, torch.arange(4), on_block_done=done):
            loss.backward()
    *inner, _ = (behind.nbytes for behind in localgrad.features(network, inputs))  # the output is let go of
    besides = [alive - boundary for alive, boundary in zip(found, [*inner, 0], strict=True)]
    assert all(0 <= rest < 512 for rest in besides), (found, inner)  # of 64 KiB at the least
