"""Similarity matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import TrainingError
from localgrad.losses.precision import widened
from localgrad.task import Batch


def similarity_matrix(values: Tensor) -> Tensor:
    """Cosine similarities of centred rows, clamped to [-1, 1]; (B, D) or maps (B, C, H, W) -> (B, B).

    Maps are first reduced to each channel's standard deviation over positions.
    """
    if values.dim() == 4:
        flat = values.flatten(2)
        # With a single position there is no spread to compare; the value itself is what is left.
        values = flat.std(2) if flat.shape[2] > 1 else flat[:, :, 0]
    rows = values - values.mean(1, keepdim=True)
    rows = rows / (1e-8 + torch.linalg.vector_norm(rows, dim=1, keepdim=True))  # whose gradient at 0 is 0, not NaN
    return (rows @ rows.T).clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Similarity:
    """Mean squared difference between the similarity matrices of a projection and of the one-hot labels.

    ``mean((S(projection) - S(onehot(targets)))**2)`` over the B x B entries; without those of ignored labels, below 0.

    Args:
        num_classes: width of the one-hot labels; mixed targets are used as they are.

    Raises:
        TrainingError: for masks, which have no one class.

    Source: Nokland & Eidnes, ICML 2019, arXiv:1901.06656, eq. 1 and released code.
    """

    num_classes: int

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        targets = batch.targets
        if not isinstance(targets, Tensor) or targets.dim() > 2:
            raise TrainingError(
                "similarity matching needs one class for each image, not masks or boxes; use another method"
            )
        values, targets = similarity_matrix(batch.joined(widened(output))), batch.joined(targets)
        if targets.dim() == 2:
            return F.mse_loss(values, similarity_matrix(targets.to(values.dtype)))
        known = targets >= 0
        onehot = F.one_hot(targets.where(known, 0), self.num_classes).to(values.dtype)
        pairs = known[:, None] & known
        apart = (values - similarity_matrix(onehot)).square()
        return apart.where(pairs, 0.0).sum() / pairs.sum().clamp(min=1)
