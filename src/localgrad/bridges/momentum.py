"""The bridge of MAN and MAN++: what the next block would make of the features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from localgrad.bridges.copies import Init, copied
from localgrad.errors import MethodError, nearest
from localgrad.recompute.parts import Parts
from localgrad.site import Site
from localgrad.twins import Buffers, Twin, When

Mix = Literal["sum", "scaled", "ema", "learnable", "pair"]


@dataclass(frozen=True)
class Momentum:
    """A twin of the next unit, which follows it by a moving average, beside a learnable companion of the same form.

    ``sum``: ``companion(h) + twin(h)``; ``scaled``: ``s * companion(h) + (2 - s) * twin(h)`` with a learnable scalar
    ``s`` that starts at 1; ``ema`` and ``learnable`` keep one of the two; ``pair`` adds two learnable copies, as many
    parameters as ``sum`` without a moving average.

    Args:
        decay: of the moving average.
        mix: see above.
        depth: units looked through; those after the first are learnable copies without a twin.
        twin_init: ``source`` copies the neighbour's weights, ``fresh`` draws new ones, ``kaiming`` draws them as
            `localgrad.initialization.kaiming` does.
        companion_init: the same for the learnable copies.
        exchange, buffers: see `localgrad.twins.Twin`.

    It is built only where the next unit can be copied (`localgrad.site.Site.next_units`).

    Source: Su et al., MAN, ECCV 2024, arXiv:2407.05623; MAN++, arXiv:2507.16279.
    """

    decay: float = 0.995
    mix: Mix = "sum"
    depth: int = 1
    twin_init: Init = "source"
    companion_init: Init = "fresh"
    exchange: When = "after"
    buffers: Buffers = "none"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise MethodError(f"depth={self.depth}; the bridge needs at least one unit")
        if not 0.0 <= self.decay <= 1.0:
            raise MethodError(f"decay={self.decay}; a moving average needs a decay between 0 and 1")
        for name, value, known in (
            ("mix", self.mix, Mix), ("twin_init", self.twin_init, Init), ("companion_init", self.companion_init, Init),
            ("exchange", self.exchange, When), ("buffers", self.buffers, Buffers),
        ):  # fmt: skip
            if value not in get_args(known):
                raise MethodError(nearest(value, get_args(known), name))

    def __call__(self, site: Site) -> nn.Module | None:
        if not site.next_units:
            return None
        return MomentumBridge([unit.module for unit in site.next_units[: self.depth]], self)


class MomentumBridge(nn.Module):
    """See `Momentum`."""

    def __init__(self, units: Sequence[nn.Module], settings: Momentum) -> None:
        super().__init__()
        source, *later = units
        self.mix = settings.mix
        pair = settings.mix == "pair"
        self.twin: nn.Module | None = None
        self.twins: list[Twin] = []
        if settings.mix != "learnable":
            self.twin = copied(source, settings.companion_init if pair else settings.twin_init)
        if self.twin is not None and not pair:
            self.twin.requires_grad_(False)
            self.twins = [Twin(source, self.twin, settings.decay, settings.exchange, settings.buffers)]
        self.companion: nn.Module | None = None if settings.mix == "ema" else copied(source, settings.companion_init)
        self.later = Parts(*(copied(unit, settings.companion_init) for unit in later))
        if settings.mix == "scaled":
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        if self.twin is None:
            assert self.companion is not None
            mixed = self.companion(features)
        elif self.companion is None:
            mixed = self.twin(features)
        elif self.mix != "scaled":
            mixed = self.companion(features) + self.twin(features)
        else:
            mixed = self.scale * self.companion(features) + (2.0 - self.scale) * self.twin(features)
        return self.later(mixed)
