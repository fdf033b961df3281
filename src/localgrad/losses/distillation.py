"""Soft targets: a head learns what another one answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from localgrad.layout import LAYERS
from localgrad.losses.precision import widened
from localgrad.method import Context
from localgrad.task import Batch, Loss


def divergence(logits: Tensor, other: Tensor, temperature: float = 1.0, reverse: bool = False) -> Tensor:
    """``KL(softmax(other / T) || softmax(logits / T))``, or the ``reverse``, averaged over samples and positions.

    Both are (B, C), (B, C, h, w), (B, C, d, h, w), or (B, C, positions); maps of ``other`` are resized to the grid of
    ``logits``.
    """
    if logits.shape[2:] != other.shape[2:]:
        mode = LAYERS[logits.dim() - 2].resize
        other = F.interpolate(widened(other), size=logits.shape[2:], mode=mode, align_corners=False)
    ours = F.log_softmax(widened(logits) / temperature, 1)
    theirs = F.log_softmax(widened(other) / temperature, 1)
    pair = (theirs, ours) if reverse else (ours, theirs)
    return F.kl_div(*pair, reduction="batchmean", log_target=True) / math.prod(logits.shape[2:])


@dataclass(frozen=True)
class Distilled:
    """``(1 - weight) * loss + weight * T ** 2 * divergence`` where the teacher answered, ``loss`` where it did not.

    Source: Hinton et al., 2015, arXiv:1503.02531.

    Args:
        loss: of the labels.
        logits: reads the logits of distributions off an output, see `localgrad.method.Method.require_logits`.
        teacher: the context whose answer, or None, `localgrad.task.Batch` holds.
        weight: of the soft targets.
        temperature: T.
    """

    loss: Loss
    logits: Callable[[Any], Tensor]
    teacher: Context
    weight: float
    temperature: float

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        answer = batch.context[self.teacher]
        if answer is None:
            return self.loss(output, batch)
        soft = self.temperature**2 * divergence(self.logits(output), self.logits(answer), self.temperature)
        return (1.0 - self.weight) * self.loss(output, batch) + self.weight * soft
