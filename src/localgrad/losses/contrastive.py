"""Supervised contrastive loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import TrainingError
from localgrad.losses.precision import widened
from localgrad.task import Batch


@dataclass(frozen=True)
class Contrastive:
    """Pull embeddings of one class together: one view per sample, L2-normalised, positives share the anchor's label.

    ``-(1 / B) * sum_i (1 / max(1, |P(i)|)) * sum_{p in P(i)} log(exp(z_i.z_p / t) / sum_{a != i} exp(z_i.z_a / t))``
    (times temperature / base temperature, which are equal). An anchor without positives contributes 0.
    Samples whose label is negative take no part.

    Args:
        temperature: t.

    Raises:
        TrainingError: for mixed targets (such as mixup gives) and masks, which have no one class.

    Source: Khosla et al., 2020, arXiv:2004.11362, as used by InfoPro, ICLR 2021, arXiv:2101.10832.
    """

    temperature: float = 0.07

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        labels = batch.targets
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise TrainingError(
                "the contrastive loss needs one class per image: switch mixup off; masks and boxes have none, numbers "
                "and several labels are none"
            )
        z, labels = batch.joined(F.normalize(widened(output), dim=1)), batch.joined(labels)
        logits = z @ z.T / self.temperature
        known = labels >= 0
        others = ~torch.eye(len(z), dtype=torch.bool, device=z.device) & known
        log_probability = logits - torch.logsumexp(logits.masked_fill(~others, float("-inf")), 1, keepdim=True)
        positives = (labels[:, None] == labels[None, :]) & others
        counts = positives.sum(1).clamp(min=1)
        of_anchors = log_probability.masked_fill(~positives, 0.0).sum(1) / counts
        return -of_anchors.masked_fill(~known, 0.0).sum() / known.sum().clamp(min=1)
