"""Soft targets: a head learns what another one answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import TrainingError
from localgrad.layout import LAYERS
from localgrad.losses.precision import widened
from localgrad.method import Context
from localgrad.task import Batch, Loss


def divergence(logits: Tensor, other: Tensor, temperature: float = 1.0, reverse: bool = False) -> Tensor:
    """``KL(softmax(other / T) || softmax(logits / T))``, or the ``reverse``, averaged over samples and positions.

    Both are (B, num_classes) or (B, num_classes, h, w), or volumes; maps of ``other`` are resized to the grid of
    ``logits``.
    """
    if logits.shape[2:] != other.shape[2:]:
        mode = LAYERS[logits.dim() - 2].resize
        other = F.interpolate(widened(other), size=logits.shape[2:], mode=mode, align_corners=False)
    ours = F.log_softmax(widened(logits) / temperature, 1)
    theirs = F.log_softmax(widened(other) / temperature, 1)
    pair = (theirs, ours) if reverse else (ours, theirs)
    return F.kl_div(*pair, reduction="batchmean", log_target=True) / math.prod(logits.shape[2:])


def logits_of(output: Any) -> Tensor:
    """The logits (B, num_classes), (B, num_classes, h, w) or (B, num_classes, d, h, w) that an output is, or that it
    holds as ``out``.

    Raises:
        TrainingError: it holds none.
    """
    logits = output.get("out") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 4, 5):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise TrainingError(
            f"soft targets need logits (B, num_classes) or (B, num_classes, h, w), but the network answers with {found}"
        )
    return logits


@dataclass(frozen=True)
class Distilled:
    """``(1 - weight) * loss + weight * T ** 2 * divergence`` where the teacher answered, ``loss`` where it did not.

    Source: Hinton et al., 2015, arXiv:1503.02531.

    Args:
        loss: of the labels.
        teacher: the context whose answer, or None, `localgrad.task.Batch` holds; see `logits_of`.
        weight: of the soft targets.
        temperature: T.
    """

    loss: Loss
    teacher: Context
    weight: float
    temperature: float

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        answer = batch.context[self.teacher]
        if answer is None:
            return self.loss(output, batch)
        soft = self.temperature**2 * divergence(logits_of(output), logits_of(answer), self.temperature)
        return (1.0 - self.weight) * self.loss(output, batch) + self.weight * soft
