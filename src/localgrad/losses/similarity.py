"""Similarity matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import TrainingError
from localgrad.losses.precision import widened
from localgrad.task import Batch, Task


def similarity_matrix(values: Tensor) -> Tensor:
    """Cosine similarities of centred rows, clamped to [-1, 1]; (B, D) or maps (B, C, H, W), (B, C, L), ... -> (B, B).

    Maps are first reduced to each channel's standard deviation over positions.
    """
    if values.dim() > 2:
        flat = values.flatten(2)
        # With a single position there is no spread to compare; the value itself is what is left.
        values = flat.std(2) if flat.shape[2] > 1 else flat[:, :, 0]
    rows = values - values.mean(1, keepdim=True)
    rows = rows / (1e-8 + torch.linalg.vector_norm(rows, dim=1, keepdim=True))  # whose gradient at 0 is 0, not NaN
    return (rows @ rows.T).clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Similarity:
    """Mean squared difference between the similarity matrices of a projection and of the one-hot labels.

    ``mean((S(projection) - S(onehot(targets)))**2)`` over the B x B entries. Samples without a label take no part.

    Args:
        task: its ``onehot(targets)`` are the rows, (B, num_classes): NaN for a sample without a label.

    Raises:
        TrainingError: for a task without them: masks, boxes and numbers have no one class.

    Source: Nokland & Eidnes, ICML 2019, arXiv:1901.06656, eq. 1 and released code.
    """

    task: Task

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        onehot = getattr(self.task, "onehot", None)
        if onehot is None:
            raise TrainingError(
                "similarity matching needs one class for each image, not masks, boxes or numbers; use another method"
            )
        values = batch.joined(widened(output))

        def wanted_of(targets: Any) -> tuple[Tensor, Tensor, Tensor]:
            """The labels' matrix, 0 where it is not known, where it is, and the inverse share of that."""
            wanted = similarity_matrix(batch.joined(onehot(targets)).to(values.dtype))
            known = ~wanted.isnan()
            return wanted.where(known, 0.0), known, known.numel() / known.sum().clamp(min=1)

        wanted, known, entries = batch.of_targets((Similarity, id(self.task), values.dtype), wanted_of)
        return F.mse_loss(similarity_matrix(values).where(known, 0.0), wanted) * entries
