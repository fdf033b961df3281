"""Average pooling before everything else a boundary carries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, cat, nn

from localgrad.errors import MethodError
from localgrad.layout import Layout, ToMaps
from localgrad.site import Site


@dataclass(frozen=True)
class Pool:
    """``factor x factor`` average pooling of positions, as far as ``least`` of them remain; prefix tokens stay.

    The first ``start`` boundaries keep all positions. A head or a copied unit behind it costs ``factor ** 2`` times
    less; ``factor`` times for signals, ``factor ** 3`` for volumes. Ours.
    """

    factor: int = 2
    least: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if self.factor < 1 or self.least < 1 or self.start < 0:
            raise MethodError(
                f"factor={self.factor}, least={self.least}, start={self.start}; pooling needs a factor and a grid of "
                "at least 1, from boundary 0 or a later one on"
            )

    def __call__(self, site: Site) -> nn.Module | None:
        if site.span.stop <= self.start:
            return None
        factors = tuple(max(1, min(self.factor, side // self.least)) for side in site.layout.grid)
        return _Pool(site.layout, factors) if max(factors) > 1 else None


class _Pool(nn.Module):
    def __init__(self, layout: Layout, factors: tuple[int, ...]) -> None:
        super().__init__()
        self.layout, self.to_maps = layout, ToMaps(layout)
        self.pool = layout.layers.average_pool(factors)

    def forward(self, features: Tensor) -> Tensor:
        kind, prefix = self.layout.kind, self.layout.prefix
        pooled = self.pool(self.to_maps(features))
        if kind == "maps":
            return pooled
        if kind == "channels_last":
            return pooled.movedim(1, -1)
        tokens = pooled.flatten(2).transpose(1, 2)
        return tokens if prefix == 0 else cat((features[:, :prefix], tokens), 1)
