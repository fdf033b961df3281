"""Soft targets: a head learns what another one answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import TrainingError
from localgrad.losses.precision import widened
from localgrad.method import Batch, Context, Loss


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T ** 2 * KL(softmax(teacher / T) || softmax(logits / T))``, both (B, num_classes), averaged over the batch.

    Source: Hinton et al., 2015, arXiv:1503.02531.
    """
    ours = F.log_softmax(widened(logits) / temperature, 1)
    theirs = F.log_softmax(widened(teacher) / temperature, 1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def check_logits(output: Any) -> None:
    """Raise `TrainingError` unless ``output`` is (B, num_classes)."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TrainingError(f"soft targets need logits (B, num_classes), but the network answers with {found}")


@dataclass(frozen=True)
class Distilled:
    """``(1 - weight) * loss + weight * soft_cross_entropy`` where the teacher answered, ``loss`` where it did not.

    Args:
        loss: of the labels.
        teacher: the context whose logits (B, num_classes), or None, `localgrad.method.Batch` holds.
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
        check_logits(output)
        soft = soft_cross_entropy(output, answer, self.temperature)
        return (1.0 - self.weight) * self.loss(output, batch) + self.weight * soft


@dataclass(frozen=True)
class Consistent:
    """``share * loss + (1 - share) * KL(softmax(output) || softmax(previous))``; uniform where there is none before.

    Source: field notes on SID (arXiv:2510.03273): the belief of a block stays near that of the block before.
    """

    loss: Loss
    share: float
    reads_previous: ClassVar[bool] = True

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        check_logits(output)
        ours = F.log_softmax(widened(output), 1)
        before = output.new_zeros(output.shape) if batch.previous is None else batch.previous
        theirs = F.log_softmax(widened(before), 1)
        divergence = F.kl_div(theirs, ours, reduction="batchmean", log_target=True)
        return self.share * self.loss(output, batch) + (1.0 - self.share) * divergence
