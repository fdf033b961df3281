"""The projection that similarity matching compares."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from localgrad.layout import ToMaps
from localgrad.site import Site


@dataclass(frozen=True)
class Projection:
    """A 3x3 convolution without bias that keeps the channels; a linear layer for features without positions.

    Source: Nokland & Eidnes, ICML 2019, arXiv:1901.06656, released code.
    """

    def __call__(self, site: Site) -> nn.Module:
        if math.prod(site.layout.grid) == 1:
            return nn.Sequential(ToMaps(site.layout), nn.Flatten(), nn.Linear(site.channels, site.channels, bias=False))
        convolution = site.layout.layers.conv(site.channels, site.channels, 3, padding=1, bias=False)
        return nn.Sequential(ToMaps(site.layout), convolution)
