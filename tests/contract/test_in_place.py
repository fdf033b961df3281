"""A block that begins in place: trained exactly, or refused; what the model answers never changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from localgrad import LocalNetwork, MethodError, PartitionError, methods
from localgrad.recompute import pointwise
from zoo import METHODS, TASK, batch

CUTS = ("1", "2", "3")
DGL = METHODS["dgl"]
EVERY = METHODS | {
    "pointwise": methods.checkpointing(DGL, where="pointwise"),
    "auglocal, one block at the end": methods.auglocal(TASK, depth=1, tail=1),
}


def added(x: Tensor) -> Tensor:
    x += torch.tanh(x.detach())
    return x


def scaled(x: Tensor) -> Tensor:
    return x.mul_(1.5)


def through_a_view(x: Tensor) -> Tensor:
    x.view(x.shape[0], -1).mul_(1.5)
    return x


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(1.5)
    return x


FIRST: dict[str, Any] = {
    "relu": nn.ReLU(inplace=True),
    "silu": nn.SiLU(inplace=True),
    "dropout": nn.Dropout(0.2, inplace=True),
    "added": added,
    "scaled": scaled,
    "view": through_a_view,
    "no_grad": without_gradient,
}


class Unit(nn.Module):
    """What overwrites its input, or a copy of it, and a convolution."""

    def __init__(self, first: Any, on_copy: bool) -> None:
        super().__init__()
        self.first, self.on_copy = first, on_copy
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.first(x.clone() if self.on_copy else x))


def built(first: Any, on_copy: bool, name: str) -> LocalNetwork:
    torch.manual_seed(0)
    units = [Unit(copy.deepcopy(first), on_copy) for _ in CUTS]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return localgrad.localize(model, EVERY[name], CUTS, example=batch(2)[0])


def gradients(network: LocalNetwork) -> list[Tensor]:
    found = []
    for step in (0, 1):
        network.zero_grad(set_to_none=True)
        with localgrad.keyed_randomness(0):
            localgrad.backward(network, *batch(), step)
        found += [p.grad for p in network.parameters() if p.grad is not None]
    return found


@pytest.mark.parametrize("name", [name for name in EVERY if name != "trgl(dgl)"])
def test_exact_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "LEAST_BYTES", 0)
    for kind, first in FIRST.items():
        try:
            network = built(first, False, name)
            found = gradients(network)
        except (PartitionError, MethodError) as error:
            assert "inplace=False" in str(error) and name not in ("dgl", "pointwise"), kind
            continue
        x, _ = batch()
        network.eval()
        *_, (_, _, answer) = localgrad.local_outputs(network, x)
        assert torch.equal(answer, network.model(x)), kind
        pairs = zip(found, gradients(built(first, True, name)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), kind


def test_a_head_that_overwrites_what_it_reads() -> None:
    """Refused in training and in evaluation, before the next block reads it."""

    network = built(nn.Identity(), False, "dgl")
    for auxiliary in network.auxiliary.values():
        auxiliary.heads[0] = nn.Sequential(nn.SiLU(inplace=True), auxiliary.heads[0])
    with pytest.raises(MethodError, match="behind block 0 overwrites the features"):
        localgrad.backward(network, *batch())
    network.eval()
    with pytest.raises(MethodError, match="behind block 0 overwrites the features"):
        list(localgrad.local_outputs(network, batch()[0]))
