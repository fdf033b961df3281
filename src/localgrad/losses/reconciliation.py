"""How far the gradients of two neighbouring blocks disagree about the features between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import MethodError, nearest
from localgrad.losses.precision import widened

Distance = Literal["l2", "relative", "cosine"]


@dataclass(frozen=True)
class Reconciliation:
    """``weight * distance(q, d)`` of two gradients (B, ...) with respect to the same features, averaged over samples.

    ``l2``: ``|q - d|^2`` of the gradients of each sample's own loss, so that the batch size does not count;
    ``relative``: ``|q - d|^2 / |d|^2``; ``cosine``: ``1 - cos(q, d)``.
    """

    weight: float
    distance: Distance = "l2"

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise MethodError(f"weight={self.weight}; it must be at least 0")
        if self.distance not in get_args(Distance):
            raise MethodError(nearest(self.distance, get_args(Distance), "distance"))

    def __call__(self, later: Tensor, earlier: Tensor) -> Tensor:
        q, d = widened(later).flatten(1), widened(earlier).flatten(1)
        if self.distance == "cosine":
            return self.weight * (1.0 - F.cosine_similarity(q, d)).mean()
        apart = (q - d).square().sum(1)
        if self.distance == "relative":
            return self.weight * (apart / d.square().sum(1).clamp_min(1e-30)).mean()
        return self.weight * len(q) ** 2 * apart.mean()
