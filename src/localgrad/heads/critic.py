"""The head of local critic training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from localgrad.layout import ToMaps
from localgrad.site import Site


@dataclass(frozen=True)
class Critic:
    """One 3x3 convolution that keeps the channels, ReLU, global pooling, a linear layer.

    Without BatchNorm, since a head that follows runs twice a step.

    Source: Lee et al., Local Critic Training, arXiv:2102.01963: one convolutional layer each.
    """

    outputs: int

    def __call__(self, site: Site) -> nn.Module:
        by = site.layout.layers
        return nn.Sequential(
            ToMaps(site.layout),
            by.conv(site.channels, site.channels, 3, padding=1),
            nn.ReLU(inplace=True),
            by.adaptive_pool(1),
            nn.Flatten(),
            nn.Linear(site.channels, self.outputs),
        )
