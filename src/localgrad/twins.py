"""Parameters that cross a boundary: twins follow their neighbours by an exponential moving average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from localgrad.errors import MethodError

if TYPE_CHECKING:
    from localgrad.network import LocalNetwork


@dataclass(frozen=True)
class Twin:
    """A copy that follows a source: ``copy <- decay * copy + (1 - decay) * source``, parameter by parameter.

    Args:
        source: a unit of the model, trained by its own loss.
        copy: a module with the same parameters; none of them requires grad.
        decay: 0 copies, 1 never moves.

    Raises:
        MethodError: for a decay outside [0, 1] or parameters of other shapes.
    """

    source: nn.Module
    copy: nn.Module
    decay: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise MethodError(f"decay={self.decay}; a moving average needs a decay between 0 and 1")
        shapes = [[tuple(p.shape) for p in module.parameters()] for module in (self.source, self.copy)]
        if shapes[0] != shapes[1]:
            raise MethodError(
                f"a twin has parameters of shapes {shapes[1]}, its source {shapes[0]}; they must be equal"
            )

    def update(self) -> None:
        """Move the copy once."""
        copies, sources = list(self.copy.parameters()), list(self.source.parameters())
        if copies:
            get_ema_multi_avg_fn(self.decay)(copies, sources, 0)


@torch.no_grad()
def exchange(network: LocalNetwork) -> None:
    """Move every twin of ``network`` once; call it after the step's backward passes, as design and papers place it.

    Does nothing for methods without twins.
    """
    for twin in network.twins:
        twin.update()
