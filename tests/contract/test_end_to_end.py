"""The span over all blocks is ordinary back-propagation, bit for bit; checkpointing and micro-batches are exact too."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.methods import accumulation, checkpointing, e2e
from localgrad.spans import EndToEnd
from zoo import BASES, METHODS, MODELS, batch, build, steps

ON_EVERY_MODEL = pytest.mark.parametrize("model", MODELS)
# Deep supervision is also one way back through everything, but with several losses: see test_wide_spans.py.
ONE_SPAN = [name for name, m in METHODS.items() if isinstance(m.spans, EndToEnd) and m.micro_batches == 1]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = gradients(found), gradients(expected)
    assert ours.keys() == theirs.keys() == dict(expected.named_parameters()).keys()
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name
    for (name, buffer), (_, other) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_checkpointing_is_among_them() -> None:
    assert ONE_SPAN == ["e2e", "checkpointing(e2e)"]


@pytest.mark.parametrize("name", ONE_SPAN)
@pytest.mark.parametrize(
    "num_blocks, dtype", [(k, torch.float32) for k in (1, 2, 3, 4, 5)] + [(k, torch.float64) for k in (1, 3, 5)]
)
@ON_EVERY_MODEL
def test_equals_plain_backward(name: str, num_blocks: int, dtype: torch.dtype, model: str) -> None:
    network = build(model, METHODS[name], num_blocks).to(dtype)
    assert network.num_blocks == num_blocks
    plain = copy.deepcopy(network.model)
    for step in range(2):  # gradients of the second step are added to those of the first
        inputs, targets = batch(seed=step)
        inputs = inputs.to(dtype)
        torch.manual_seed(step)
        F.cross_entropy(plain(inputs), targets).backward()
        after = torch.get_rng_state()
        torch.manual_seed(step)
        for _, loss in localgrad.local_losses(network, inputs, targets, step):
            loss.backward()
        assert torch.equal(torch.get_rng_state(), after)
    assert_same(network.model, plain)


@ON_EVERY_MODEL
def test_equals_plain_backward_under_autocast(model: str) -> None:
    network = build(model, METHODS["e2e"], 3)
    plain = copy.deepcopy(network.model)
    inputs, targets = batch()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(plain(inputs).float(), targets)
    loss.backward()
    torch.manual_seed(0)
    for _, loss in localgrad.local_losses(network, inputs, targets, autocast=torch.bfloat16):
        loss.backward()
    assert_same(network.model, plain)


@pytest.mark.parametrize("base", BASES)
@ON_EVERY_MODEL
def test_checkpointing_changes_no_gradient_of_any_base(base: str, model: str) -> None:
    method = BASES[base]
    if base in ("dgl", "infopro", "predsim"):
        method = localgrad.methods.windows(method, width=3)
    kept = build(model, method, 4)
    again = build(model, checkpointing(method), 4)
    inputs, targets = batch()
    for network in (kept, again):
        torch.manual_seed(3)
        localgrad.backward(network, inputs, targets)
    assert_same(again, kept)


@pytest.mark.parametrize("size, parts", [(8, 2), (8, 4), (10, 4), (3, 8)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_accumulation_is_a_loop_over_micro_batches(size: int, parts: int, checkpointed: bool) -> None:
    base = e2e(BASES["e2e"].task)
    method = accumulation(checkpointing(base) if checkpointed else base, parts=parts)
    network = build("residual", method, 3).double()
    plain = copy.deepcopy(network.model)
    inputs, targets = batch(size)
    inputs = inputs.double()
    edges = [size * k // parts for k in range(parts + 1)]
    torch.manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for a, b in pairwise(edges):
        if b > a:
            loss = F.cross_entropy(plain(inputs[a:b]), targets[a:b]) * ((b - a) / size)
            loss.backward()
            total += loss.detach()
    torch.manual_seed(0)
    (found,) = localgrad.backward(network, inputs, targets).values()
    assert_same(network.model, plain)
    assert torch.equal(found, total)


@pytest.mark.parametrize("base", [name for name in METHODS if METHODS[name].micro_batches == 1])
def test_accumulation_of_any_method_is_a_loop_over_micro_batches(base: str) -> None:
    method = METHODS[base]
    whole, looped = build("residual", accumulation(method, parts=2), 4), build("residual", method, 4)
    for module in (*whole.modules(), *looped.modules()):  # draws come in another order: a block for all parts first
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    inputs, targets = batch()
    torch.manual_seed(0)
    localgrad.backward(whole, inputs, targets)
    torch.manual_seed(0)
    for x, y in zip(inputs.chunk(2), targets.chunk(2), strict=True):
        for _, loss in localgrad.local_losses(looped, x, y):
            (loss * 0.5).backward()
    found = gradients(whole)
    for name, gradient in gradients(looped).items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0, msg=name)


def test_accumulation_equals_the_whole_batch_without_batchnorm() -> None:
    method = METHODS["dgl"]
    head = localgrad.methods.dgl(method.task, head=method.terms[0].head.__class__(4, 0, 0))
    whole = build("transformer", head, 4, dropout=0.0).double()
    parts = build("transformer", accumulation(head, parts=4), 4, dropout=0.0).double()
    inputs, targets = batch(10)
    localgrad.backward(whole, inputs.double(), targets)
    localgrad.backward(parts, inputs.double(), targets)
    found = gradients(parts)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-14, msg=name)


def test_a_frozen_first_block_is_left_alone() -> None:
    for name in ("e2e", "dgl", "windows(dgl)", "deep_supervision", "checkpointing(e2e)"):
        network = build("residual", METHODS[name], 3)
        for parameter in network.parameters_of(0):
            parameter.requires_grad_(False)
        plain = copy.deepcopy(network.model)
        inputs, targets = batch()
        torch.manual_seed(0)
        localgrad.backward(network, inputs, targets)
        assert all(p.grad is None for p in network.parameters_of(0))
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
        if name.endswith("e2e)") or name == "e2e":
            torch.manual_seed(0)
            F.cross_entropy(plain(inputs), targets).backward()
            for key, gradient in gradients(plain).items():
                assert torch.equal(network.model.get_parameter(key).grad, gradient), key


@pytest.mark.parametrize("base", METHODS)
@pytest.mark.parametrize("model", ["residual", "transformer"])
def test_recomputing_pointwise_operations_changes_no_bit_of_any_method(
    base: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localgrad.recompute.pointwise, "LEAST_BYTES", 0)
    kept = build(model, METHODS[base], 4)
    again = build(model, checkpointing(METHODS[base], where="pointwise"), 4)
    inputs, targets = batch()
    for step in steps(kept, limit=12):
        for network in (kept, again):
            torch.manual_seed(3)
            localgrad.backward(network, inputs, targets, step)
    found = gradients(again)
    assert found and found.keys() == gradients(kept).keys()
    for name, gradient in gradients(kept).items():
        assert torch.equal(found[name], gradient), name
    for (name, buffer), (_, other) in zip(again.named_buffers(), kept.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
