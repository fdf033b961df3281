"""Linear read-outs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from localgrad.layout import Pool, ToMaps
from localgrad.site import Site


@dataclass(frozen=True)
class Linear:
    """Pool over positions (or take the class token), then one linear layer to ``outputs``.

    Tokens pass a LayerNorm first, as the read-outs of vision transformers do.
    """

    outputs: int

    def __call__(self, site: Site) -> nn.Module:
        layers: list[nn.Module] = [Pool(site.layout), nn.Linear(site.channels, self.outputs)]
        if site.layout.kind in ("tokens", "channels_last"):
            layers.insert(1, nn.LayerNorm(site.channels))
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class PooledLinear:
    """Average-pool to at most about ``size`` values, then one linear layer to ``outputs``, weights starting at 0.

    The grid becomes the largest one of equal sides with ``channels * side**2 <= size``.

    Source: Nokland & Eidnes, ICML 2019, arXiv:1901.06656 (released code: pooling until the flattened size is small).
    Differs: adaptive pooling, so that any grid works; theirs needs sides that divide.
    """

    outputs: int
    size: int = 1024

    def __call__(self, site: Site) -> nn.Module:
        side = max(1, math.isqrt(self.size // site.channels))
        grid = (min(side, site.layout.grid[0]), min(side, site.layout.grid[1]))
        linear = nn.Linear(site.channels * grid[0] * grid[1], self.outputs)
        nn.init.zeros_(linear.weight)
        return nn.Sequential(ToMaps(site.layout), nn.AdaptiveAvgPool2d(grid), nn.Flatten(), linear)
