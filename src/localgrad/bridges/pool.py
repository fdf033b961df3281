"""Average pooling before everything else a boundary carries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, cat, nn
from torch.nn import functional as F

from localgrad.errors import MethodError
from localgrad.layout import Layout
from localgrad.site import Site


@dataclass(frozen=True)
class Pool:
    """``factor x factor`` average pooling of positions, as far as ``least`` of them remain; prefix tokens stay.

    The first ``start`` boundaries keep all positions. A head or a copied unit behind it costs ``factor ** 2`` times
    less. Ours.
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
        if site.layout.kind == "vector" or factors == (1, 1):
            return None
        return _Pool(site.layout, factors)  # type: ignore[arg-type]


class _Pool(nn.Module):
    def __init__(self, layout: Layout, factors: tuple[int, int]) -> None:
        super().__init__()
        self.layout, self.factors = layout, factors

    def forward(self, features: Tensor) -> Tensor:
        kind, prefix = self.layout.kind, self.layout.prefix
        if kind == "maps":
            return F.avg_pool2d(features, self.factors)
        if kind == "channels_last":
            return F.avg_pool2d(features.permute(0, 3, 1, 2), self.factors).permute(0, 2, 3, 1)
        maps = features[:, prefix:].transpose(1, 2).unflatten(2, self.layout.grid)
        pooled = F.avg_pool2d(maps, self.factors).flatten(2).transpose(1, 2)
        return pooled if prefix == 0 else cat((features[:, :prefix], pooled), 1)
