"""One bridge behind another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from localgrad.recompute.parts import Parts
from localgrad.site import BridgeBuilder, Site


@dataclass(frozen=True)
class Chain:
    """``second`` on what ``first`` makes of the features; either may have nothing to build at a site."""

    first: BridgeBuilder
    second: BridgeBuilder

    def __call__(self, site: Site) -> nn.Module | None:
        first = self.first(site)
        if first is None:
            return self.second(site)
        second = self.second(site.beyond(first))
        return first if second is None else Parts(first, second)


def chain(first: BridgeBuilder | None, second: BridgeBuilder) -> BridgeBuilder:
    """``second`` behind ``first``, or alone."""
    return second if first is None else Chain(first, second)
