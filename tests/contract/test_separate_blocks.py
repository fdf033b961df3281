"""Every method over separate blocks, as ranks and recomputation run them: what the model's own forward gives."""

from __future__ import annotations

import copy

import pytest
import torch

import localgrad
from localgrad.partition import SeparateBlocks
from localgrad.rehearsal import rehearse
from zoo import METHODS, batch, build, steps


def separated(network: localgrad.LocalNetwork, example: torch.Tensor) -> localgrad.LocalNetwork:
    """The same network, whose blocks are called one by one."""
    other = copy.deepcopy(network)
    other._separate = (SeparateBlocks(localgrad.separate_blocks(other)),)
    _, other.watch = rehearse(other, example)
    return other


@pytest.mark.parametrize("model", ["residual", "transformer"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_separate_blocks_train_as_the_own_forward_does(name: str, model: str) -> None:
    own = build(model, METHODS[name], 4)
    inputs, targets = batch()
    other = separated(own, inputs[:2])
    assert other.suspended is not own.suspended and isinstance(other.suspended, SeparateBlocks)
    for step in steps(own):
        for network in (own, other):
            network.zero_grad(set_to_none=True)
            with localgrad.keyed_randomness(seed=1):
                localgrad.backward(network, inputs, targets, step)
            localgrad.exchange(network)
        for (key, p), q in zip(own.named_parameters(), other.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), key
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=0, msg=key)
        for (key, p), q in zip(own.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(q, p, rtol=0, atol=0, msg=key)
