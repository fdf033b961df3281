"""AugLocal again, literally: the formula for the picked units, the pyramid, and heads built unit by unit by hand."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from test_man import train_both
from test_papers import CLASSES, TASK, copied, data
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.heads.remaining import picked
from localgrad.methods import auglocal
from localgrad.models import CifarResNet


def to_even(value: Fraction) -> int:
    """The nearest whole number, the even one of two."""
    below = math.floor(value)
    rest = value - below
    if rest != Fraction(1, 2):
        return below + (rest > Fraction(1, 2))
    return below if below % 2 == 0 else below + 1


def picks(unit: int, length: int, depth: int) -> list[int]:
    """``round(l + (L - 1 - l) / d * i)`` for i = 1 .. d, all that remain if there are fewer than d."""
    remaining = length - 1 - unit
    if remaining <= depth:
        return list(range(unit + 1, length))
    return [to_even(unit + Fraction(remaining, depth) * i) for i in range(1, depth + 1)]


def pyramid(depth: int, share: Fraction, modules: int) -> list[int]:
    """``max(1, round(d * (1 - t * i / (n - 2)) + t * i / (n - 2)))`` for each head i of n local modules."""
    found = []
    for i in range(modules - 1):
        done = share * Fraction(i, modules - 2) if modules > 2 else Fraction(0)
        found.append(max(1, to_even(depth * (1 - done) + done)))
    return found


def test_the_formula_by_hand() -> None:
    assert picks(0, 10, 3) == [3, 6, 9]
    assert picks(2, 9, 4) == [4, 5, 6, 8]  # 3.5, 5, 6.5, 8
    assert picks(4, 7, 5) == [5, 6]
    assert pyramid(6, Fraction(1, 2), 3) == [6, 4]  # 3.5 is rounded to 4
    assert pyramid(1, Fraction(1, 2), 9) == [1] * 8


@pytest.mark.parametrize("depth", range(1, 9))
def test_picked_units(depth: int) -> None:
    """Of units of one form, for every network of up to 30 units and every boundary."""
    for length in range(2, 31):
        for unit in range(length - 1):
            rest = tuple(SimpleNamespace(name=k, changes_form=False) for k in range(unit + 1, length))
            found = [one.name for one in picked(rest, depth, unit)]
            assert found == picks(unit, length, depth), (length, unit)


def shapes_of(units: list[nn.Module]) -> list[tuple[int, int, int]]:
    """Channels in and out, and the stride, of residual units."""
    return [(u.conv1.in_channels, u.conv1.out_channels, u.conv1.stride[0]) for u in units]


def expected_shapes(unit: int, stage: int, depth: int) -> list[tuple[int, int, int]]:
    """Picked units with the width of their place, stride 2 where the channels double; a skipped stage is not skipped.

    Unit 0 is the stem of a network with ``stage`` residual units in each of three stages.
    """

    def width(index: int) -> int:
        return 16 if index == 0 else 16 * 2 ** ((index - 1) // stage)

    shapes = []
    now = width(unit)
    for index in picks(unit, 3 * stage + 1, depth):
        if width(index) == now:
            shapes.append((now, now, 1))
        while now < width(index):
            shapes.append((now, 2 * now, 2))
            now *= 2
    return shapes


@pytest.mark.parametrize("stage, depth, share", [(3, 1, 0.5), (3, 2, 0.5), (3, 4, 0.5), (5, 3, 1.0), (5, 6, 0.25)])
def test_heads_of_a_resnet(stage: int, depth: int, share: float) -> None:
    """One block per unit, K - d - 1 heads, the last ``depth + 1`` units trained together; heads by the formula."""
    torch.manual_seed(0)
    length = 3 * stage + 1
    model = CifarResNet(6 * stage + 2, CLASSES)
    images = torch.randn(2, 3, 16, 16)
    network = localgrad.localize(model, auglocal(TASK, depth=depth, pyramid=share), length, example=images)
    modules = length - depth  # K - d, the last one of d + 1 units
    assert [(s.start, s.stop) for s in network.spans(0)] == [
        *((k, k + 1) for k in range(modules - 1)),
        (modules - 1, length),
    ]
    assert len(network.auxiliary) == length - depth - 1
    for unit, units in enumerate(pyramid(depth, Fraction(share), modules)):
        (head,) = network.auxiliary[f"{unit}-{unit + 1}"].heads
        body, *read = head
        assert shapes_of(list(body)) == expected_shapes(unit, stage, units)
        norms = [layer for layer in read if isinstance(layer, nn.BatchNorm1d)]
        assert len(norms) == (units == 1)  # BatchNorm before the linear layer of a head of one unit
        assert isinstance(read[-1], nn.Linear)


class OwnUnit(nn.Module):
    """A residual unit of its own: 3x3, 3x3, and a 1x1 shortcut where the channels double."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.b, self.bn = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.around = nn.ModuleList()
        if stride == 2:
            self.around.extend([nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.b(torch.relu(self.an(self.a(x)))))
        for layer in self.around:
            x = layer(x)
        return torch.relu(x + y)


class OwnHead(nn.Module):
    def __init__(self, shapes: list[tuple[int, int, int]], flat: bool) -> None:
        super().__init__()
        self.units = nn.ModuleList(OwnUnit(*shape) for shape in shapes)
        width = shapes[-1][1]
        self.norm = nn.BatchNorm1d(width) if flat else None
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        x = x.mean((2, 3))
        return self.fc(x if self.norm is None else self.norm(x))


@pytest.mark.parametrize("share, released", [(1, False), (Fraction(1, 2), True)])
def test_three_steps(share: Fraction, released: bool) -> None:
    """Seven units, heads of two units and one, the last three units and the classifier by plain back-propagation."""
    torch.manual_seed(0)
    model = CifarResNet(14, CLASSES).double()
    _, images, targets = data()
    method = auglocal(TASK, depth=2, pyramid=float(share), released=released)
    network = localgrad.localize(model, method, 7, example=images)
    bare = copy.deepcopy(model)
    depths = pyramid(2, share, 5)
    assert depths == ([2] * 4 if released else [2, 2, 1, 1])
    library = [network.auxiliary[f"{k}-{k + 1}"] for k in range(4)]
    own = [
        copied(OwnHead(expected_shapes(k, 2, depth), depth == 1), aux)
        for k, (depth, aux) in enumerate(zip(depths, library, strict=True))
    ]
    second = bare.layer2

    def step(_: int) -> None:
        x = torch.relu(bare.bn1(bare.conv1(images)))
        F.cross_entropy(own[0](x), targets).backward()
        for k, unit in enumerate([*bare.layer1, second[0]], start=1):
            x = unit(x.detach())
            F.cross_entropy(own[k](x), targets).backward()
        F.cross_entropy(bare.fc(bare.layer3(second[1](x.detach())).mean((2, 3))), targets).backward()

    train_both(network, bare, own, library, step)


def test_weights_are_the_heads_own() -> None:
    torch.manual_seed(0)
    model = CifarResNet(14, CLASSES)
    network = localgrad.localize(model, auglocal(TASK), 7, example=torch.randn(2, 3, 16, 16))
    convolutions = [p for p in model.parameters() if p.dim() == 4]
    for p in network.auxiliary.parameters():
        assert p.requires_grad
        assert p.dim() < 4 or not any(q.shape == p.shape and torch.equal(p, q) for q in convolutions)
