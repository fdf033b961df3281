"""Micro-batches pass block by block: the same numbers as part by part, and the gradients of one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import localgrad
from localgrad.measure.memory import LiveBytes
from localgrad.method import Accumulate, Method
from localgrad.spans import groups
from zoo import METHODS, MODELS, batch, build, steps, widest

EVERY = pytest.mark.parametrize("name", METHODS)
BLOCKS = 4
PARTS = 3
SIZE = 10  # parts of 3, 3 and 4 samples


def data() -> tuple[Tensor, Tensor]:
    inputs, targets = batch(SIZE)
    return inputs.double(), targets


def in_parts(method: Method, parts: int) -> Method:
    return replace(method, accumulate=Accumulate(parts))


def pair(name: str, model: str) -> tuple[localgrad.LocalNetwork, localgrad.LocalNetwork]:
    """A network that runs its batches in parts, and one with the same weights that does not."""
    ours, plain = (build(model, in_parts(METHODS[name], k), BLOCKS, dropout=0.0).double() for k in (PARTS, 1))
    for parameter in ours.auxiliary.parameters():  # heads that start at 0 would hide gradients
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def part_by_part(network: localgrad.LocalNetwork, step: int) -> Iterator[torch.Tensor]:
    """The losses of each part, weighted by its share, one part after the other."""
    inputs, targets = data()
    edges = [SIZE * k // PARTS for k in range(PARTS + 1)]
    for part in range(PARTS):
        rows = slice(edges[part], edges[part + 1])
        if part < PARTS - 1:  # twins that move before the optimizer step move once a step
            network.exchange_before_step = lambda boundary: None
        for _, loss in localgrad.local_losses(network, inputs[rows], targets[rows], step):
            yield loss * ((rows.stop - rows.start) / SIZE)
        vars(network).pop("exchange_before_step", None)


@pytest.mark.parametrize(
    "name, model",
    [(name, model) for name in METHODS for model in MODELS if not (model == "cnn" and "trgl" in name)],
)
def test_gradients_equal_those_part_by_part(name: str, model: str) -> None:
    ours, plain = pair(name, model)
    for step in steps(ours):
        order = [str(span) for span, loss in localgrad.local_losses(ours, *data(), step) if loss.backward() is None]
        for loss in part_by_part(plain, step):
            loss.backward()
        if widest(METHODS[name], BLOCKS) == 1:  # all parts of a block, then the next block
            assert order == [f"({k}, {k + 1})" for k in range(BLOCKS) for _ in range(PARTS)]
        for (path, p), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (expected.grad is None), path
            if p.grad is not None:
                torch.testing.assert_close(p.grad, expected.grad, rtol=1e-12, atol=1e-14, msg=path)
    for (path, found), expected in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, msg=path)


@pytest.mark.parametrize("model", ["residual", "transformer"])
@EVERY
def test_weights_equal_those_part_by_part_where_blocks_step_one_by_one(name: str, model: str) -> None:
    ours, plain = pair(name, model)
    before = copy.deepcopy(ours.state_dict())
    one = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], 0.1, momentum=0.9)
    each = [torch.optim.SGD(ours.block_parameters(k), 0.1, momentum=0.9) for k in range(BLOCKS)]

    def done(block: int) -> None:
        each[block].step()
        each[block].zero_grad(set_to_none=True)

    for step in (*steps(ours), 1):
        for _, loss in localgrad.local_losses(ours, *data(), step, on_block_done=done):
            loss.backward()
        assert all(p.grad is None for p in ours.parameters())
        for loss in part_by_part(plain, step):
            loss.backward()
        one.step()
        one.zero_grad(set_to_none=True)
        for network in (ours, plain):
            localgrad.exchange(network)
    moved = 0
    for (path, found), expected in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13, msg=path)
        moved += not torch.equal(found, before[path])
    assert moved > 0


def gradient_bytes(network: localgrad.LocalNetwork, block: int) -> int:
    return sum(p.nbytes for p in network.block_parameters(block))


@pytest.mark.parametrize("model", ["residual", "transformer"])
@EVERY
def test_gradients_of_one_group_of_blocks_are_held_at_a_time(name: str, model: str) -> None:
    """Where spans are single blocks that is one block; heads that learn from the next loss wait one block longer."""
    network = build(model, in_parts(METHODS[name], PARTS), BLOCKS)
    inputs, targets = batch(SIZE)
    late = any(rule.late for rule in network.rules)

    def done(block: int) -> None:
        for parameter in network.block_parameters(block):
            parameter.grad = None

    for step in steps(network):
        runs = groups(network.spans(step), BLOCKS)
        held = [sum(gradient_bytes(network, k) for k in run) for run in runs]
        if late:
            held = [a + b for a, b in zip(held, [0, *held], strict=False)]
        with LiveBytes(network.parameters()) as live:
            for _, loss in localgrad.local_losses(network, inputs, targets, step, on_block_done=done):
                loss.backward()
            del loss
        peak = max(gradients for _, gradients in live.timeline)
        assert live.gradients == 0
        assert 0 < peak <= max(held)
        if len(runs) == BLOCKS and not late:
            assert peak < sum(held)


def test_the_bytes_of_gradients_are_exactly_those_of_the_largest_block() -> None:
    network = build("residual", in_parts(METHODS["dgl"], PARTS), BLOCKS)
    inputs, targets = batch(SIZE)
    peaks = []
    for done in (lambda block: network.zero_grad(set_to_none=True), None):
        network.zero_grad(set_to_none=True)
        with LiveBytes(network.parameters()) as live:
            for _, loss in localgrad.local_losses(network, inputs, targets, on_block_done=done):
                loss.backward()
            del loss
        peaks.append(max(gradients for _, gradients in live.timeline))
    each = [gradient_bytes(network, k) for k in range(BLOCKS)]
    assert peaks == [max(each), sum(each)]


def test_graphs_of_one_part_are_alive_at_a_time() -> None:
    """Activations fall with the parts, down to one boundary feature for each part that waits."""
    inputs, targets = batch(24)
    peaks = []
    for parts in (1, 2, 4):
        network = build("cnn", in_parts(METHODS["dgl"], parts), BLOCKS, width=16)
        localgrad.backward(network, inputs, targets)
        network.zero_grad(set_to_none=True)
        with LiveBytes(network.parameters()) as live:
            localgrad.backward(network, inputs, targets)
        peaks.append(live.peak_activations)
    features = 24 * 16 * 8 * 8 * 4
    assert peaks[0] > peaks[1] > peaks[2]
    graph = peaks[0] - features  # of all samples, beside one boundary
    assert peaks[2] <= graph / 4 + 2.2 * features
