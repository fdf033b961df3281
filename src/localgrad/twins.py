"""Parameters that cross a boundary: twins follow their neighbours by an exponential moving average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from localgrad.errors import MethodError, nearest

When = Literal["after", "before"]
Buffers = Literal["none", "copy", "ema"]


@dataclass(frozen=True)
class Twin:
    """A copy that follows a source: ``copy <- decay * copy + (1 - decay) * source``, parameter by parameter.

    Args:
        source: a unit of the model, trained by its own loss.
        copy: a module with the same parameters; none of them requires grad.
        decay: 0 copies, 1 never moves.
        exchange: ``after`` the optimizer step, by `exchange`; or ``before`` it, by the engine as soon as the losses at
            the twin's boundary are back-propagated, so that it lags one step.
        buffers: what happens to BatchNorm statistics: ``none`` keeps the copy's own, ``copy`` takes the source's,
            ``ema`` averages them like parameters.

    Raises:
        MethodError: for a value out of range or parameters of other shapes.
    """

    source: nn.Module
    copy: nn.Module
    decay: float
    exchange: When = "after"
    buffers: Buffers = "none"

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise MethodError(f"decay={self.decay}; a moving average needs a decay between 0 and 1")
        for name, value, known in (("exchange", self.exchange, When), ("buffers", self.buffers, Buffers)):
            if value not in get_args(known):
                raise MethodError(nearest(value, get_args(known), name))
        shapes = [[tuple(p.shape) for p in module.parameters()] for module in (self.source, self.copy)]
        if shapes[0] != shapes[1]:
            raise MethodError(
                f"a twin has parameters of shapes {shapes[1]}, its source {shapes[0]}; they must be equal"
            )

    @torch.no_grad()
    def update(self) -> None:
        """Move the copy once."""
        copies, sources = list(self.copy.parameters()), list(self.source.parameters())
        if self.buffers != "none":
            for ours, theirs in zip(self.copy.buffers(), self.source.buffers(), strict=True):
                if self.buffers == "ema" and ours.is_floating_point():
                    copies.append(ours)  # type: ignore[arg-type]
                    sources.append(theirs)  # type: ignore[arg-type]
                else:
                    ours.copy_(theirs)
        if copies:
            get_ema_multi_avg_fn(self.decay)(copies, sources, 0)
