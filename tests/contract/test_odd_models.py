"""Models that do what few models do: isolated gradients equal those of a forward with `detach` written into it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import localgrad
from localgrad import MethodError, PartitionError, methods

METHOD = methods.dgl(localgrad.tasks.classification(3), head="linear")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(x)) + x


class Staged(nn.Module):
    """Stages; ``between`` sees what each one is about to read, and returns what it reads."""

    def __init__(self, stages: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.stages, self.head = nn.Linear(6, 8), nn.ModuleList(stages), nn.Linear(8, 3)
        self.between: Callable[[int, Tensor], Tensor] = lambda k, x: x

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for k, stage in enumerate(self.stages):
            x = stage(self.between(k, x))
        return self.head(x)


def made(layer: type[nn.Module], at: int | None = None, whole: type[Staged] = Staged) -> Staged:
    """Four stages of one kind, or that kind at one place only."""
    return whole([layer() if at in (None, k) else Layer() for k in range(4)])


class CalledTwice(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(torch.tanh(self.lin(x)))


class TanhInPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x.tanh_())


class Alias(Layer):
    """Returns its input, of which it used nothing but the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x) + 0 * self.lin(x.detach())


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x.to(torch.cfloat) @ self.weight).sum(-1)


class HalfBuffer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((8,), 0.5, dtype=torch.half))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class PartlyWithoutGradient(Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.lin(x).sigmoid()
        return self.lin(x) * gate


class _Squared(torch.autograd.Function):
    """Whose backward pass is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class OwnFunction(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return _Squared.apply(self.lin(x))


class _Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class DirtyFunction(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(_Dirty.apply(x))


class Transposed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).t().contiguous().t()


class Expanded(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(1, keepdim=True).expand(-1, 8))


class Checkpointed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class HookOnFeatures(Layer):
    """Scales the gradient of what it returns, inside the block that made it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 5)
        return y


class Functional(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.lin, {"weight": self.lin.weight * 2}, (x,)).tanh()


class Mapped(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: F.linear(row, self.lin.weight).tanh())(x)


def normed(norm: Callable[[nn.Module], nn.Module]) -> Staged:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Staged([nn.Sequential(norm(nn.Linear(8, 8)), nn.Tanh()) for _ in range(4)])


class ViewOfMore(Staged):
    """The features are a view of a larger tensor, of which nobody reads the rest."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for k, stage in enumerate(self.stages):
            x = stage(self.between(k, torch.cat([x, x], 1)[:, :8]))
        return self.head(x)


class WholeNumbersCross(Staged):
    """A choice by index, made in one block and used in the next."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for k, stage in enumerate(self.stages):
            chosen = x.argmax(1, keepdim=True)
            x = stage(self.between(k, x))
            x = x + x.gather(1, chosen)
        return self.head(x)


class InANest(Staged):
    """What the first stage made waits in a list in a dictionary."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        box: dict[str, list[Tensor]] = {}
        for k, stage in enumerate(self.stages):
            x = stage(self.between(k, x))
            if k == 0:
                box["waiting"] = [x * 2]
        waiting = box["waiting"][0]
        return self.head(x + (waiting if self.between.__name__ == "<lambda>" else waiting.detach()))


class OnAnAttribute(Staged):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.seen = (x * 2).detach()
        for k, stage in enumerate(self.stages):
            x = stage(self.between(k, x))
        return self.head(x + self.seen)


def hooked() -> Staged:
    model = made(Layer)
    model.stages[1].register_forward_hook(lambda module, args, output: output * 2)
    model.stages[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.stages[3].register_full_backward_hook(
        lambda module, inputs, outputs: tuple(None if g is None else g * 3 for g in inputs)
    )
    return model


def tied() -> Staged:
    model = made(Layer)
    model.stages[3].lin.weight = model.stages[1].lin.weight
    return model


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def one_parametrization() -> Staged:
    model, scaled = made(Layer), Scaled()
    for stage in model.stages:
        parametrize.register_parametrization(stage.lin, "weight", scaled)
    return model


LAYERS = [
    Layer, CalledTwice, Complex, HalfBuffer, PartlyWithoutGradient, OwnFunction, Transposed, Expanded, Checkpointed,
    HookOnFeatures, Functional, Mapped,
]  # fmt: skip
MODELS: dict[str, Callable[[], Staged]] = {layer.__name__: lambda layer=layer: made(layer) for layer in LAYERS}
MODELS |= {
    "in place": lambda: made(TanhInPlace, at=2),
    "in place by a function": lambda: made(DirtyFunction, at=2),
    "alias": lambda: made(Alias, at=1),
    "view": lambda: made(Layer, whole=ViewOfMore),
    "whole numbers": lambda: made(Layer, whole=WholeNumbersCross),
    "nest": lambda: made(Layer, whole=InANest),
    "attribute": lambda: made(Layer, whole=OnAnAttribute),
    "hooks": hooked,
    "tied": tied,
    "one parametrization": one_parametrization,
    "spectral_norm": lambda: normed(parametrizations.spectral_norm),
    "weight_norm": lambda: normed(parametrizations.weight_norm),
    "orthogonal": lambda: normed(parametrizations.orthogonal),
    "spectral_norm by hooks": lambda: normed(nn.utils.spectral_norm),
    "weight_norm by hooks": lambda: normed(nn.utils.weight_norm),
    "averages of all batches": lambda: normed(lambda linear: nn.Sequential(linear, nn.BatchNorm1d(8, momentum=None))),
}
SHARED = ("tied", "one parametrization")


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def seeded(build: Callable[[], Staged]) -> Staged:
    torch.manual_seed(1)
    return build()


@pytest.mark.parametrize("cut", [(2,), (1, 2, 3)], ids=["2 blocks", "4 blocks"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_gradients_of_a_literal_forward(name: str, cut: tuple[int, ...]) -> None:
    x, y = batch()
    names = tuple(f"stages.{k}" for k in cut)
    network = localgrad.localize(seeded(MODELS[name]), METHOD, names, example=x, shared=name in SHARED)
    heads = copy.deepcopy(network.auxiliary)
    reference, losses = seeded(MODELS[name]), []

    def between(k: int, features: Tensor) -> Tensor:
        if k not in cut:
            return features
        block = cut.index(k)
        (answer,) = heads[f"{block}-{block + 1}"](features.clone())
        losses.append(F.cross_entropy(answer, y))
        return features.detach()

    reference.between = between
    losses.append(F.cross_entropy(reference(x), y))
    sum(losses[1:], losses[0]).backward()
    localgrad.backward(network, x, y)
    for ours, theirs in ((network.model, reference), (network.auxiliary, heads)):
        for (key, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None), key
            if other.grad is not None:
                torch.testing.assert_close(parameter.grad, other.grad)
        for (key, buffer), moved in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            assert torch.equal(buffer, moved), key


class ComplexFeatures(Complex):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.cfloat) @ self.weight


class Magnitudes(Staged):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.abs())


class KeptGraph(Staged):
    """An attribute carries a graph past the cuts."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for k, stage in enumerate(self.stages):
            x = stage(x)
            if k == 0:
                self.seen = x * 2
        return self.head(x + self.seen)


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "complex features": (lambda: made(ComplexFeatures, whole=Magnitudes), MethodError, "behind block 0 are complex"),
    "a graph on an attribute": (lambda: made(Layer, whole=KeptGraph), PartitionError, "MulBackward0 crosses there"),
    "tied weights": (tied, PartitionError, r"shared=True"),
    "lazy": (lambda: normed(lambda _: nn.LazyLinear(8)), PartitionError, r"run the model once on the example"),
    "lazy statistics": (
        lambda: normed(lambda linear: nn.Sequential(linear, nn.LazyBatchNorm1d())), PartitionError, r"first forward",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_refused(name: str) -> None:
    build, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        localgrad.localize(build(), METHOD, ("stages.1", "stages.2", "stages.3"), example=batch()[0])
