"""Models as people hand them over: from torch, torchvision, timm, transformers, MONAI, diffusers, peft and by hand."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import localgrad
from localgrad import methods
from localgrad.batches import call_model
from localgrad.partition import Partition
from localgrad.study.examination import Candidate
from reach import REACH

# The batch is not the first dimension of what crosses, so no head can answer for each sample.
REFUSED = {"gru_stack", "packed_lstm_chain"}
TRAINED = sorted(set(REACH) - REFUSED)
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


def build(name: str) -> Candidate:
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return REACH[name]()
    except ImportError as error:
        pytest.skip(f"{name}: {error}")


def seeded(run: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    return run()


def gradients(model: nn.Module) -> dict[str, Any]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", TRAINED)
def test_end_to_end_is_loss_backward(name: str) -> None:
    """Bit for bit, also where several blocks read one value, whose gradients are added in the order of autograd."""
    one = build(name)
    plain = copy.deepcopy(one.model)
    network = localgrad.localize(
        one.model, methods.e2e(one.task), one.num_blocks, example=one.inputs, shared=one.shared
    ).train()
    batch = localgrad.Batch(one.inputs, one.targets, 0)
    plain.train()
    seeded(lambda: one.task.loss(call_model(plain, one.inputs), batch).backward())
    seeded(lambda: localgrad.backward(network, one.inputs, one.targets))
    expected, found = gradients(plain), gradients(one.model)
    assert any(gradient is not None for gradient in expected.values())
    for key, gradient in expected.items():
        assert (gradient is None) == (found[key] is None), key
        if gradient is not None:
            assert torch.equal(found[key], gradient), key


@pytest.mark.parametrize("method", ["dgl", "man_pp"])
@pytest.mark.parametrize("name", TRAINED)
def test_trains_block_by_block(name: str, method: str) -> None:
    one = build(name)
    base = methods.dgl(one.task)
    network = localgrad.localize(
        one.model, base if method == "dgl" else methods.man_pp(base), one.num_blocks, example=one.inputs,
        shared=one.shared,
    ).train()  # fmt: skip
    assert network.num_blocks == one.num_blocks
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 1e-3)
    trained: set[str] = set()
    for step in range(5):
        losses = seeded(lambda step=step: localgrad.backward(network, one.inputs, one.targets, step))
        assert all(loss.isfinite() for loss in losses.values())
        trained |= {key for key, gradient in gradients(network).items() if gradient is not None}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        localgrad.exchange(network)
    if name != "layer_drop":
        assert trained == {key for key, p in network.named_parameters() if p.requires_grad}
    assert network.checked  # the graph of every loss was walked in the first step


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_features_without_a_batch_dimension_in_front_are_no_boundary(name: str) -> None:
    one = build(name)
    assert len(Partition(one.model, one.inputs).finest) < one.num_blocks - 1
    with pytest.raises(localgrad.PartitionError, match="cut points"):
        localgrad.localize(one.model, methods.dgl(one.task), one.num_blocks, example=one.inputs)
