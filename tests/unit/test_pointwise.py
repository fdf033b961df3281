"""Recomputed normalisations and activation functions: the same bits, fewer bytes, errors where autograd has them."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad import methods
from localgrad.measure.memory import LiveBytes, measure, saved_storages
from localgrad.recompute import pointwise
from localgrad.recompute.pointwise import pointwise_recomputed

TASK = localgrad.tasks.classification(10)


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "LEAST_BYTES", 0)


def pair(inplace: bool, function: Callable[..., nn.Module] = nn.ReLU) -> nn.Module:
    """Two convolutions, each followed by BatchNorm and an activation function."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), function(inplace=inplace)]
    return nn.Sequential(*layers, nn.Conv2d(4, 4, 3))


class Mixed(nn.Module):
    """What a table of operations could get wrong: slices, casts, branches, in-place arithmetic, frozen statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4).eval()
        self.linear = nn.Linear(8, 8)
        self.layer_norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        left, right = y.chunk(2, 1)
        z = torch.cat([right, left], 1).transpose(2, 3)
        z = F.silu(self.norm2(self.conv2(z)), inplace=True)
        z = self.conv3(z) + self.conv3(y)  # y is read three times
        z = F.hardswish(self.norm3(z))
        z = self.linear(self.layer_norm(z).double().float())
        z = F.gelu(z) + F.leaky_relu(z) + F.relu6(z)
        changed = F.gelu(self.layer_norm(z))
        changed += z  # allowed, since GELU keeps its input only; what GELU returned is no longer what lies there
        return self.linear(changed)


def gradients(model: nn.Module, x: Tensor, lean: bool, create_graph: bool = False) -> list[Tensor]:
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    with pointwise_recomputed() if lean else contextlib.nullcontext():
        loss = model(x).square().mean()
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    first = torch.autograd.grad(loss, wanted, create_graph=create_graph, allow_unused=True)
    if create_graph:
        total = sum(g.square().sum() for g in first if g is not None)
        return list(torch.autograd.grad(total, wanted, allow_unused=True))
    return [*first, *model.buffers()]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: pair(False),
    "relu in place": lambda: pair(True),
    "silu in place": lambda: pair(True, nn.SiLU),
    "hardswish in place": lambda: pair(True, nn.Hardswish),
    "relu6 in place": lambda: pair(True, nn.ReLU6),
    "leaky relu in place": lambda: pair(True, nn.LeakyReLU),
    "frozen": lambda: pair(True).requires_grad_(False),
    "evaluated": lambda: pair(True).eval(),
    "channels last": lambda: pair(True).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "twice"])
def test_the_same_bits(name: str, create_graph: bool) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(3, 4, 8, 8)
    if name == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    for a, b in zip(gradients(model, x, False, create_graph), gradients(model, x, True, create_graph), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_the_same_bits_of_mixed_operations() -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(3, 4, 8, 8)
    for a, b in zip(gradients(model, x, False), gradients(model, x, True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", [torch.bfloat16, None])
def test_the_same_bits_under_autocast(precision: torch.dtype | None) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", norm_first=True, batch_first=True)
    x = torch.randn(2, 5, 16)
    found = []
    for lean in (False, True):
        model = copy.deepcopy(layer)
        with (
            torch.autocast("cpu", precision) if precision else contextlib.nullcontext(),
            pointwise_recomputed() if lean else contextlib.nullcontext(),
        ):
            loss = model(x).float().square().sum()
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_tensor_of_three_is_kept_of_a_convolution_batchnorm_relu() -> None:
    """By hand: of each triple the input of the BatchNorm; the input of the first convolution is not its own."""
    torch.manual_seed(0)
    model, x = pair(False), torch.randn(3, 4, 8, 8)
    one = x.nbytes

    def peak(lean: bool) -> int:
        with LiveBytes() as tracker:
            with pointwise_recomputed() if lean else contextlib.nullcontext():
                loss = model(x)
            gc.collect()
            kept = tracker.current - loss.nbytes
        loss.sum().backward()
        return kept

    statistics = 2 * 2 * 4 * 4  # mean and deviation of 4 channels, of 2 BatchNorms, in float32
    assert peak(False) == 4 * one + statistics
    assert peak(True) == 2 * one + statistics


def test_computed_once_for_all_readers_and_again_for_a_second_backward() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func is torch.ops.aten.native_batch_norm.default
            return func(*args, **(kwargs or {}))

    model, x = pair(False), torch.randn(3, 4, 8, 8, requires_grad=True)
    with pointwise_recomputed():
        loss = model(x).sum()
    moved = [b.clone() for b in model.buffers()]
    for _ in range(2):
        with Count() as count:
            loss.backward(retain_graph=True)
        assert count.calls == 2  # one for each BatchNorm, though convolution and ReLU both read
    assert all(torch.equal(a, b) for a, b in zip(moved, model.buffers(), strict=True))


def test_a_tensor_overwritten_before_the_backward_pass_is_an_error() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3)), torch.randn(4, 3)
    x = x * 1
    with pointwise_recomputed():
        loss = model(x).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_nothing_outlives_the_graph() -> None:
    model, x = pair(True), torch.randn(3, 4, 8, 8)
    gc.collect()
    gc.disable()  # reference cycles would then stay
    try:
        with LiveBytes(model.parameters()) as tracker:
            with pointwise_recomputed():
                loss = model(x).sum()
            loss.backward()
            del loss
            model.zero_grad(set_to_none=True)
        assert tracker.current == 0
    finally:
        gc.enable()


def network_of(method: Any, num_blocks: int) -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    model = localgrad.models.resnet32().train()
    return localgrad.localize(model, method, num_blocks, example=torch.randn(2, 3, 32, 32))


def peak(method: Any, num_blocks: int) -> int:
    network = network_of(method, num_blocks)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    return measure(lambda: localgrad.backward(network, x, y), network.parameters()).peak_activations


def test_bytes_of_resnet32_fall_end_to_end_and_by_blocks() -> None:
    """What the fused BatchNorm and ReLU need: at most 0.16 of end-to-end where plain blocks have 0.19."""
    whole = peak(methods.e2e(TASK), 1)
    assert peak(methods.checkpointing(methods.e2e(TASK), where="pointwise"), 1) <= 0.79 * whole
    assert peak(methods.checkpointing(methods.dgl(TASK), where="pointwise"), 16) <= 0.16 * whole


def test_only_the_first_blocks_if_asked() -> None:
    """ResNet-32 in 4 blocks: the first needs the most, then the second."""
    dgl = methods.dgl(TASK)
    one, two = (methods.checkpointing(dgl, where="pointwise", first=first) for first in (1, 2))
    whole = methods.checkpointing(dgl, where="pointwise")
    assert peak(whole, 4) < peak(one, 4) < peak(dgl, 4)
    assert peak(two, 4) == peak(methods.checkpointing(one, where="pointwise"), 4) == peak(whole, 4)
    gradients_of, x = [], torch.randn(2, 3, 32, 32)
    for method in (dgl, one):
        network = network_of(method, 4)
        localgrad.backward(network, x, torch.arange(2))
        gradients_of.append([p.grad for p in network.parameters() if p.grad is not None])
    assert gradients_of[0] and all(torch.equal(a, b) for a, b in zip(*gradients_of, strict=True))
    for kwargs in ({"where": "pointwise", "first": 0}, {"where": "blocks", "first": 1}):
        with pytest.raises(localgrad.MethodError, match="write where='pointwise' and first=1"):
            methods.checkpointing(dgl, **kwargs)


def test_compiling_is_refused() -> None:
    network = network_of(methods.checkpointing(methods.dgl(TASK), where="pointwise"), 2)
    with pytest.raises(localgrad.MethodError, match=r"torch\.compile does so by itself"):
        network.compile_blocks()


def test_saved_storages_sees_what_is_left() -> None:
    """The byte balancer asks outside the context: it counts what plain autograd keeps."""
    model, x = pair(False), torch.randn(3, 4, 8, 8)
    _, saved = saved_storages(lambda: model(x), [*model.parameters(), *model.buffers(), x])
    assert sum(saved.values()) >= 4 * x.nbytes
