"""Where to cut, as a value: the third argument of `localgrad.localize`.

==================================== ===========================================================================
written                              cuts
==================================== ===========================================================================
``4``                                into 4 blocks of equally many units
``("layer2", "layer3")``             before these modules
``cuts.by_count(4, stem="own")``     by count, the stem in a block of its own
``cuts.by_bytes(8, batch_size=32)``  for the smallest memory of the fullest block
``cuts.fits("8GiB", batch_size=32)`` into the fewest blocks that fit
``[module, module, ...]``            between modules that run one after the other and together are the model
``cuts.recomputed(cutting, (0, 2))`` as ``cutting``, and runs units of blocks 0 and 2 again in the backward pass
==================================== ===========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from localgrad.batches import num_samples, positional
from localgrad.cutting import Chosen, by_bytes, by_count, check_batch_size, recomputed
from localgrad.method import Method
from localgrad.partition import Partition
from localgrad.planning.ways import fit

__all__ = ["by_bytes", "by_count", "fits", "recomputed"]


@dataclass(frozen=True)
class fits:
    """The fewest blocks that fit, cut by bytes; see `localgrad.planning.fit`, which says what is counted.

    Args:
        memory: what there is for a training step, ``"8GiB"`` or bytes. A warning says if plain training fits.
        batch_size: images in a step; None for those of the example.
        targets: of a few samples, for a task that does not tell what they look like, see `localgrad.plan`.
    """

    memory: str | int
    batch_size: int | None = None
    targets: Any = None

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)

    def choose(self, model: nn.Module, method: Method, example: Any, shared: bool) -> Chosen:
        """See `Cutting`."""
        batch_size = self.batch_size or num_samples(positional(example)) or 1
        names, recompute = fit(model, method, self.memory, example, batch_size, self.targets)
        partition = Partition(model, example, shared)
        return Chosen(partition, partition.named(names), recompute)
