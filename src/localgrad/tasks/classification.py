"""Image classification: cross-entropy, accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import ConfigError, TrainingError
from localgrad.losses.precision import widened
from localgrad.method import Batch


@dataclass(frozen=True)
class Classification:
    """A `localgrad.method.Task`; see `classification`."""

    num_classes: int
    label_smoothing: float = 0.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def num_outputs(self) -> int:
        """Logits of an auxiliary head."""
        return self.num_classes

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of logits (B, num_classes) with indices (B,) or probabilities (B, num_classes)."""
        if output.dim() != 2 or output.shape[1] != self.num_classes:
            raise TrainingError(
                f"the model returns {tuple(output.shape)}, but classification({self.num_classes}) needs "
                f"(B, {self.num_classes}); build the model with num_classes={self.num_classes}"
            )
        return F.cross_entropy(widened(output), batch.targets, label_smoothing=self.label_smoothing)

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """Whether each sample's largest logit is its class, (B,) float32; the likelier class of mixed targets."""
        return (output.argmax(1) == hard_labels(targets)).float()

    def pixels(self, inputs: Tensor) -> Tensor:
        """``inputs * std + mean``, limited to [0, 1] because augmentation may leave it by rounding."""
        mean = torch.tensor(self.mean, device=inputs.device, dtype=inputs.dtype)[:, None, None]
        std = torch.tensor(self.std, device=inputs.device, dtype=inputs.dtype)[:, None, None]
        return (inputs * std + mean).clamp(0.0, 1.0)


def hard_labels(targets: Tensor) -> Tensor:
    """Class indices (B,) of indices (B,) or of probabilities (B, num_classes)."""
    return targets.argmax(1) if targets.dim() == 2 else targets


def classification(
    num_classes: int,
    *,
    label_smoothing: float = 0.0,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> Classification:
    """Classify images into ``num_classes``.

    Args:
        num_classes: at least 2.
        label_smoothing: share of the target spread over all classes, for every head.
        mean, std: what the inputs were normalised by, per channel in [0, 1] units; reconstruction losses undo it.

    Raises:
        ConfigError: a value outside its range.

    Example:
        >>> import localgrad
        >>> localgrad.tasks.classification(10).num_outputs
        10
    """
    if num_classes < 2:
        raise ConfigError(f"num_classes={num_classes}; classification needs at least 2 classes")
    if not 0.0 <= label_smoothing < 1.0:
        raise ConfigError(f"label_smoothing={label_smoothing}; it must be at least 0 and below 1")
    if len(mean) != len(std) or not all(s > 0 for s in std):
        raise ConfigError(f"mean={mean}, std={std}; give one mean and one positive std for each channel")
    return Classification(num_classes, label_smoothing, tuple(mean), tuple(std))
