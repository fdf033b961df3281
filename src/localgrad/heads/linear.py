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

    Tokens pass a LayerNorm first, as the read-outs of vision transformers do, with the ``eps`` of the model's last one.
    """

    outputs: int

    def __call__(self, site: Site) -> nn.Module:
        layers: list[nn.Module] = [Pool(site.layout), nn.Linear(site.channels, self.outputs)]
        if site.layout.kind in ("tokens", "channels_last"):
            norms = [module for module in site.partition.model.modules() if isinstance(module, nn.LayerNorm)]
            layers.insert(1, nn.LayerNorm(site.channels, eps=norms[-1].eps if norms else 1e-5))
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class PooledLinear:
    """Average-pool to at most ``size`` values, then one linear layer to ``outputs``.

    The grid is halved, first its height, then its width, and so on, rounded up, until ``channels * height * width <=
    size`` or one position is left; volumes along three sides in turn, signals along their only one.

    Args:
        outputs: width of the linear layer.
        size: values that it reads at most.
        zeroed: its weights start at 0, or else as PyTorch draws them.

    Source: Nokland & Eidnes, ICML 2019, arXiv:1901.06656, released code; the same grids in AugLocal's.
    Differs: where halving does not divide, positions are averaged adaptively, theirs are padded with zeros.
    """

    outputs: int
    size: int = 1024
    zeroed: bool = True

    def __call__(self, site: Site) -> nn.Module:
        sides, halved = site.layout.grid, [1] * len(site.layout.grid)
        grid = list(sides)
        while site.channels * math.prod(grid) > self.size and math.prod(grid) > 1:
            which = halved.index(min(halved))
            halved[which] *= 2
            grid[which] = math.ceil(sides[which] / halved[which])
        linear = nn.Linear(site.channels * math.prod(grid), self.outputs)
        if self.zeroed:
            nn.init.zeros_(linear.weight)
        return nn.Sequential(ToMaps(site.layout), site.layout.layers.adaptive_pool(tuple(grid)), nn.Flatten(), linear)
