"""The bridge of MAN and MAN++: what the next block would make of the features."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from localgrad.errors import MethodError
from localgrad.method import Site
from localgrad.twins import Twin

Mix = Literal["sum", "scaled", "ema", "learnable"]
Init = Literal["source", "fresh"]


@dataclass(frozen=True)
class Momentum:
    """A twin of the next unit, which follows it by a moving average, beside a learnable companion of the same form.

    ``sum``: ``companion(h) + twin(h)``; ``scaled``: ``s * companion(h) + (2 - s) * twin(h)`` with a learnable scalar
    ``s`` that starts at 1; ``ema`` and ``learnable`` keep one of the two.

    Args:
        decay: of the moving average.
        mix: see above.
        depth: units looked through; those after the first are learnable copies without a twin.
        twin_init: ``source`` copies the neighbour's weights, ``fresh`` draws new ones.
        companion_init: the same for the learnable copies.

    Source: Su et al., MAN, ECCV 2024, arXiv:2407.05623; MAN++, arXiv:2507.16279.
    """

    decay: float = 0.995
    mix: Mix = "sum"
    depth: int = 1
    twin_init: Init = "source"
    companion_init: Init = "fresh"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise MethodError(f"depth={self.depth}; the bridge needs at least one unit")
        if not 0.0 <= self.decay <= 1.0:
            raise MethodError(f"decay={self.decay}; a moving average needs a decay between 0 and 1")

    def __call__(self, site: Site) -> nn.Module:
        units = site.next_units(self.depth)
        return MomentumBridge(units, self)


class MomentumBridge(nn.Module):
    """See `Momentum`."""

    def __init__(self, units: Sequence[nn.Module], settings: Momentum) -> None:
        super().__init__()
        source, *later = units
        self.mix = settings.mix
        self.twin: nn.Module | None = (
            None if settings.mix == "learnable" else _copy(source, settings.twin_init).requires_grad_(False)
        )
        self.companion: nn.Module | None = None if settings.mix == "ema" else _copy(source, settings.companion_init)
        self.later = nn.Sequential(*(_copy(unit, settings.companion_init) for unit in later))
        if settings.mix == "scaled":
            self.scale = nn.Parameter(torch.ones(()))
        self.twins = [] if self.twin is None else [Twin(source, self.twin, settings.decay)]

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


def _copy(unit: nn.Module, init: Init) -> nn.Module:
    copied = copy.deepcopy(unit)
    if init == "fresh":
        for module in copied.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return copied.train()
