"""What runs again in the backward pass begins from what its first forward began from, and leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad import cuts, methods
from localgrad.recompute import pointwise
from localgrad.recompute.parts import recomputed

TASK = localgrad.tasks.classification(3)


class Running(nn.Module):
    """Reads a running value, in place or by a new tensor moves it, and draws from three generators."""

    def __init__(self, replaced: bool) -> None:
        super().__init__()
        self.conv, self.replaced = nn.Conv2d(4, 4, 3, padding=1), replaced
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("fixed", torch.full((4, 1, 1), 0.5))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        drawn = 1.0 + random.random() + float(np.random.rand()) + float(torch.rand(()))
        y = self.conv(x) / (self.scale.clone() * drawn) * self.fixed
        if self.training:
            with torch.no_grad():
                moved = 0.5 * self.scale + 0.5 * x.abs().mean()
                if self.replaced:
                    self.scale = moved
                else:
                    self.scale.copy_(moved)
        return y.relu() + x


def net(replaced: bool) -> nn.Sequential:
    torch.manual_seed(1)
    body = [Running(replaced) for _ in range(6)]
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *body, *ends)


def seeded() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return torch.randn(8, 3, 8, 8), torch.randint(3, (8,))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_moved_buffer_and_draws_are_as_they_were(replaced: bool) -> None:
    """Gradients, buffers and the generators afterwards are those of a forward that is kept."""
    found = []
    for run in (lambda module, x: module(x), recomputed):
        module = Running(replaced).double()
        module.load_state_dict(net(replaced)[1].double().state_dict())
        x, _ = seeded()
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
        module(x.detach())  # the value has moved before
        y = run(module, x)
        y = run(module, y)  # and moves again before the first is recomputed
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters()), *module.buffers(), torch.tensor(random.random()),
                      torch.tensor(np.random.rand())])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Layer(nn.Module):
    """A residual layer, on which the others below are variations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu() * self.factor(x) + x

    def factor(self, x: Tensor) -> Any:
        """Something that the second run could get wrong."""
        return 1.0


class MovedBuffer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.scale: Tensor

    def factor(self, x: Tensor) -> Any:
        found = self.scale.clone()
        self.scale.mul_(0.5).add_(0.5 * x.detach().abs().mean())
        return found


class MovedAttribute(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(1)

    def factor(self, x: Tensor) -> Any:
        found = self.scale.clone()
        self.scale += 1
        return found


class Counter(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def factor(self, x: Tensor) -> Any:
        self.calls += 1
        return self.calls


class Cached(Layer):
    """Remembers what it saw, under a name that is not there at first."""

    def factor(self, x: Tensor) -> Any:
        found = getattr(self, "last", 1.0)
        self.last = x.detach().abs().mean()
        return found


class Listed(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def factor(self, x: Tensor) -> Any:
        self.seen.append(float(x.detach().abs().mean()))
        return sum(self.seen)


class Renormalised(Layer):
    """Reads statistics that batch normalisation moves without a word to autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, momentum=None)

    def factor(self, x: Tensor) -> Any:
        assert self.norm.running_var is not None
        found = self.norm.running_var.clone()[:, None, None]
        return self.norm(x) * found


class CalledTwice(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def factor(self, x: Tensor) -> Any:
        return self.norm(self.conv(self.norm(x)))


class InPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv(x), inplace=True)
        y += x
        return F.relu(y, inplace=True)


class Drawing(Layer):
    """Drops channels, and draws from every generator there is but its own."""

    def factor(self, x: Tensor) -> Any:
        return F.dropout2d(x, 0.5) * (1 + random.random() + float(np.random.rand()) + torch.rand(4, 1, 1))


class OwnTorchGenerator(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.source = torch.Generator().manual_seed(3)
        self.same = self.source

    def factor(self, x: Tensor) -> Any:
        return torch.rand(4, 1, 1, generator=self.source) + torch.rand(4, 1, 1, generator=self.same)


class OwnNumpyGenerator(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.other = np.random.default_rng(3), random.Random(3)

    def factor(self, x: Tensor) -> Any:
        return self.source.random() + self.other.random()


class Normed(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(self.conv)


LAYERS = [
    MovedBuffer, MovedAttribute, Counter, Cached, Listed, Renormalised, CalledTwice, InPlace, Drawing,
    OwnTorchGenerator, OwnNumpyGenerator, Normed,
]  # fmt: skip
DGL = methods.dgl(TASK, head="linear")
WAYS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {  # without, with, blocks whose units are run again
    "blocks": (methods.e2e(TASK), methods.checkpointing(methods.e2e(TASK)), ()),
    "pointwise": (methods.e2e(TASK), methods.checkpointing(methods.e2e(TASK), where="pointwise"), ()),
    "units": (DGL, DGL, (0, 1)),
    "units of a wide span": (methods.windows(DGL), methods.windows(DGL), (0, 1)),
    "windows": (methods.windows(DGL), methods.checkpointing(methods.windows(DGL)), ()),
    "pgl": (methods.pgl(DGL, recompute=False), methods.pgl(DGL), ()),
    "micro-batches": (
        methods.accumulation(methods.e2e(TASK), parts=2),
        methods.accumulation(methods.checkpointing(methods.e2e(TASK)), parts=2), (),
    ),
    "bridge": (methods.man(DGL), methods.checkpointing(methods.man(DGL), where="auxiliary"), ()),
    "lean": (methods.lean(TASK), methods.lean(TASK), (0,)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_recomputation(layer: type[Layer], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of two steps, buffers, and what the generators draw afterwards are those of the same method without."""
    monkeypatch.setattr(pointwise, "LEAST_BYTES", 0)
    plain, again, blocks = WAYS[way]
    found = []
    for method, cutting in ((plain, ("3",)), (again, cuts.recomputed(("3",), blocks) if blocks else ("3",))):
        torch.manual_seed(1)
        ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *(layer() for _ in range(4)), *ends)
        x, y = seeded()
        network = localgrad.localize(model, method, cutting, example=x[:2])
        seeded()
        values: list[Any] = []
        for step, autocast in enumerate((None, torch.bfloat16)):
            with localgrad.keyed_randomness(0):
                localgrad.backward(network, x, y, step, autocast=autocast)
            values += [p.grad.clone() for p in network.parameters() if p.grad is not None]
            values += [b.clone() for b in network.buffers()]
            values += [torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])]
        values += [torch.tensor([part.calls for part in model.modules() if isinstance(part, Counter)])]
        found.append(values)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("layer", [MovedBuffer, MovedAttribute, Counter, Cached, Listed, OwnTorchGenerator])
def test_localize_leaves_the_state_of_a_model(layer: type[Layer]) -> None:
    """What the model computes afterwards is what it would have computed."""
    x, _ = seeded()
    found = []
    for cut in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer(), layer(), nn.Flatten(), nn.Linear(256, 3))
        if cut:
            localgrad.localize(model, DGL, 2, example=x[:2])
        found.append(model(x))
    assert torch.equal(*found)
