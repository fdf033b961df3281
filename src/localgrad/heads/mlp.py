"""The head of decoupled greedy learning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from localgrad.errors import MethodError
from localgrad.layout import ToMaps
from localgrad.site import Site


def _linear(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]


@dataclass(frozen=True)
class MLP:
    """``mlp-sr``: pool the grid to a quarter of its sides, 1x1 convolutions, pool to 2x2, fully connected layers.

    Convolutions keep the C channels, hidden layers are 4C wide; each is followed by BatchNorm and ReLU.

    Args:
        outputs: width of the last linear layer.
        convolutions: number of 1x1 convolutions.
        layers: number of hidden fully connected layers.
        grid: sides of the first pooling, at most those of the features; None for a quarter of these.
        width: channels of the convolutions; None for those of the features.
        pooled: sides of the second pooling.
        hidden: width of the hidden layers; None for what the second pooling leaves.

    Source: Belilovsky et al., DGL, ICML 2020, arXiv:1901.08164, released ``mlp-sr`` head. With ``grid=8, width=128,
    pooled=1, hidden=512`` it is the head of MAN++'s released CIFAR code, and with a ``grid`` of 96, which pools nothing
    there, that of MLAAN's.
    Differs: nothing known for square maps; sides smaller than ``pooled`` are pooled to what there is.
    """

    outputs: int
    convolutions: int = 3
    layers: int = 3
    grid: int | None = None
    width: int | None = None
    pooled: int = 2
    hidden: int | None = None

    def __post_init__(self) -> None:
        for name in ("convolutions", "layers"):
            if getattr(self, name) < 0:
                raise MethodError(f"{name}={getattr(self, name)}; it must be at least 0")
        for name in ("grid", "width", "pooled", "hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MethodError(f"{name}={value}; it must be at least 1")

    def __call__(self, site: Site) -> nn.Module:
        grid = tuple(math.ceil(side / 4) if self.grid is None else min(self.grid, side) for side in site.layout.grid)
        pooled = tuple(min(self.pooled, side) for side in grid)
        by = site.layout.layers
        parts: list[nn.Module] = [ToMaps(site.layout), by.adaptive_pool(grid)]
        channels = site.channels
        for _ in range(self.convolutions):
            wide = self.width or channels
            parts += [by.conv(channels, wide, 1, bias=False), by.batch_norm(wide), nn.ReLU(inplace=True)]
            channels = wide
        parts += [by.adaptive_pool(pooled), nn.Flatten()]
        inputs = channels * math.prod(pooled)
        for _ in range(self.layers):
            hidden = self.hidden or inputs
            parts += _linear(inputs, hidden)
            inputs = hidden
        return nn.Sequential(*parts, nn.Linear(inputs, self.outputs))
