"""What a loss divides by, over all parts and replicas of a batch.

A mean over samples needs nothing: parts and replicas are weighted by their samples. A mean over something else, the
pixels that are not ignored, say, has to be weighted by how much of that a part has:

    part 1: samples 1 2, of 90 pixels that count       loss_1 = mean over 90     weight 90 / 100, not 1 / 2
    part 2: samples 3 4, of 10                         loss_2 = mean over 10     weight 10 / 100
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Count = Callable[[Any], Tensor]
# ``balance(count, key, least)``: the factor of a loss that divides by ``max(count(targets), least)``. Counts of one key
# are equal.
BalanceOf = Callable[[Count, Hashable, float], Tensor | float]


def whole(count: Count, key: Hashable, least: float) -> float:
    """The factor where the batch is in one part on one replica."""
    return 1.0


class Balance:
    """The counts of one batch, each found once.

    Args:
        targets: of all parts of this replica.
        samples: of all parts and replicas.
        joined: the rows of all replicas, see `localgrad.task.Batch`; None for one replica.
    """

    def __init__(self, targets: Any, samples: int, joined: Callable[[Tensor], Tensor] | None = None) -> None:
        self.targets, self.samples, self.joined = targets, samples, joined
        self.known: dict[Hashable, Tensor] = {}

    def of(self, targets: Any, samples: int) -> BalanceOf:
        """For the part with these ``targets``, of so many samples."""
        return partial(self._factor, targets, samples)

    @torch.no_grad()
    def _factor(self, targets: Any, samples: int, count: Count, key: Hashable, least: float) -> Tensor:
        """``(count(part) / samples(part)) / (count(batch) / samples(batch))``: exactly 1 where each counts as much."""
        if key not in self.known:
            all_of_it = count(self.targets).double().reshape(1)
            self.known[key] = (all_of_it if self.joined is None else self.joined(all_of_it)).sum()
        everything = self.known[key].clamp(min=least) * samples
        return torch.where(everything > 0, count(targets).double().clamp(min=least) * self.samples / everything, 0.0)
