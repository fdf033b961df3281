"""The head of decoupled greedy learning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from localgrad.layout import ToMaps
from localgrad.method import Site


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

    Source: Belilovsky et al., DGL, ICML 2020, arXiv:1901.08164, released ``mlp-sr`` head.
    Differs: nothing known for square maps; sides smaller than 2 are pooled to what there is.
    """

    outputs: int
    convolutions: int = 3
    layers: int = 3

    def __call__(self, site: Site) -> nn.Module:
        grid = tuple(math.ceil(side / 4) for side in site.layout.grid)
        pooled = tuple(min(2, side) for side in grid)
        parts: list[nn.Module] = [ToMaps(site.layout), nn.AdaptiveAvgPool2d(grid)]  # type: ignore[arg-type]
        for _ in range(self.convolutions):
            parts += [
                nn.Conv2d(site.channels, site.channels, 1, bias=False),
                nn.BatchNorm2d(site.channels),
                nn.ReLU(inplace=True),
            ]
        parts += [nn.AdaptiveAvgPool2d(pooled), nn.Flatten()]  # type: ignore[arg-type]
        width = site.channels * pooled[0] * pooled[1]
        for _ in range(self.layers):
            parts += _linear(width, width)
        return nn.Sequential(*parts, nn.Linear(width, self.outputs))
