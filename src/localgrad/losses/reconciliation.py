"""How far the gradients of two neighbouring blocks disagree about the features between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from localgrad.errors import MethodError
from localgrad.losses.precision import widened


@dataclass(frozen=True)
class Reconciliation:
    """``weight * |q - d| ** 2`` of two gradients (B, ...) with respect to the same features, averaged over samples.

    The gradients are those of each sample's own loss, so that the batch size does not count.
    """

    weight: float

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise MethodError(f"weight={self.weight}; it must be at least 0")

    def __call__(self, later: Tensor, earlier: Tensor) -> Tensor:
        q, d = widened(later).flatten(1), widened(earlier).flatten(1)
        return self.weight * len(q) ** 2 * (q - d).square().sum(1).mean()
