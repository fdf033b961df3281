"""The distance of two attention maps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import TrainingError
from localgrad.layout import LAYERS
from localgrad.losses.precision import widened
from localgrad.method import Context
from localgrad.task import Batch


@dataclass(frozen=True)
class AttentionTransfer:
    """``|| q / |q| - t / |t| ||^2`` of the flattened maps, averaged over the batch; 0 if equal, at most 2.

    The larger of two grids is pooled to the smaller one.

    Args:
        teacher: the context whose maps, a list of (B, 1, H, W) for the boundaries in order, the batch holds; signals
            and volumes have one side or three.

    Raises:
        TrainingError: grids have different numbers of sides.

    Source: Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928, equation 2, squared.
    """

    teacher: Context

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        ours, theirs = widened(output), widened(batch.context[self.teacher][batch.boundary - 1])
        if ours.dim() != theirs.dim():
            raise TrainingError(
                f"boundary {batch.boundary}: attention maps of shape {tuple(ours.shape)} cannot be compared with the "
                f"teacher's of shape {tuple(theirs.shape)}, whose positions have another number of sides; name layers "
                "of the teacher that have as many, feature_distillation(task, teacher=..., layers=(...))"
            )
        sides = tuple(min(a, b) for a, b in zip(ours.shape[2:], theirs.shape[2:], strict=True))
        pool = LAYERS[len(sides)].adaptive_pool(sides)
        ours, theirs = (F.normalize(pool(maps).flatten(1)) for maps in (ours, theirs))
        return (ours - theirs).square().sum(1).mean()
