"""What localgrad is for: peak activation bytes of one step fall with the number of blocks."""

from __future__ import annotations

import pytest
import torch

import localgrad
from localgrad.bench.memory import measure
from localgrad.method import Method

TASK = localgrad.tasks.classification(10)


def peak(method: Method, num_blocks: int, balance: str = "count", example_size: int = 2) -> int:
    torch.manual_seed(0)
    model = localgrad.models.resnet32().train()
    inputs, targets = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    network = localgrad.localize(model, method, num_blocks=num_blocks, example=inputs[:example_size], balance=balance)
    return measure(lambda: localgrad.backward(network, inputs, targets), network.parameters()).peak_activations


def test_blocks_keep_a_fraction_of_the_activations(record_property: pytest.RecordProperty) -> None:
    methods = localgrad.methods
    whole = peak(methods.e2e(TASK), 1)
    share = {
        "16 dgl blocks": peak(methods.dgl(TASK), 16) / whole,
        "8 byte-balanced dgl blocks": peak(methods.dgl(TASK), 8, "bytes") / whole,
        "8 byte-balanced dgl blocks, example as large as the batch": peak(methods.dgl(TASK), 8, "bytes", 64) / whole,
        "checkpointing(e2e), 16 blocks": peak(methods.checkpointing(methods.e2e(TASK)), 16) / whole,
    }
    for name, value in share.items():
        record_property(name, round(value, 3))
        print(f"{name}: {value:.3f} of end-to-end")
    assert share["16 dgl blocks"] <= 0.20
    assert share["8 byte-balanced dgl blocks"] <= 0.22
    assert share["8 byte-balanced dgl blocks, example as large as the batch"] <= 0.22
    assert share["16 dgl blocks"] < share["checkpointing(e2e), 16 blocks"] <= 0.35
