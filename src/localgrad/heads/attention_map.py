"""Where features are active: what feature distillation compares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from localgrad.layout import ToMaps
from localgrad.site import Site


@dataclass(frozen=True)
class AttentionMap:
    """``mean_c features ** 2``, (B, 1, H, W), or with the sides of signals and volumes. Has no parameters.

    Source: Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928, equation 1 with p = 2.
    """

    def __call__(self, site: Site) -> nn.Module:
        return nn.Sequential(ToMaps(site.layout), Energy())


class Energy(nn.Module):
    """(B, C, *grid) to (B, 1, *grid)."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.square().mean(1, keepdim=True)
