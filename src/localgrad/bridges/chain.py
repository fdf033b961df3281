"""One bridge behind another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from localgrad.method import BridgeBuilder, Site


@dataclass(frozen=True)
class Chain:
    """``second`` on what ``first`` makes of the features."""

    first: BridgeBuilder
    second: BridgeBuilder

    def __call__(self, site: Site) -> nn.Module:
        first = self.first(site).to(site.features.device)
        with torch.no_grad():
            features = first(site.features)
        return nn.Sequential(first, self.second(replace(site, features=features)))


def chain(first: BridgeBuilder | None, second: BridgeBuilder) -> BridgeBuilder:
    """``second`` behind ``first``, or alone."""
    return second if first is None else Chain(first, second)
