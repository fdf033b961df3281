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


@pytest.mark.parametrize(
    "method, cutting",
    [
        (methods.checkpointing(methods.e2e(TASK)), ("4",)),
        (methods.e2e(TASK), cuts.recomputed(("4",), blocks=(0, 1))),
        (methods.checkpointing(methods.e2e(TASK), where="pointwise"), ("4",)),
    ],
    ids=["checkpointing", "recomputed blocks", "pointwise"],
)
def test_every_kind_of_recomputation(method: Any, cutting: Any) -> None:
    """Without draws, whose keys belong to blocks, the gradients of plain PyTorch, bit for bit."""

    class Still(Running):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x) / self.scale.clone() * self.fixed
            with torch.no_grad():
                self.scale.copy_(0.5 * self.scale + 0.5 * x.abs().mean())
            return y.relu() + x

    def still() -> nn.Sequential:
        model = net(False)
        for k in range(1, 7):
            layer = Still(False)
            layer.load_state_dict(model[k].state_dict())
            model[k] = layer
        return model

    x, y = seeded()
    plain, model = still(), still()
    F.cross_entropy(plain(x), y).backward()
    localgrad.backward(localgrad.localize(model, method, cutting, example=x), x, y)
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
