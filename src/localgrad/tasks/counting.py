"""Cross-entropy of class indices, and what the losses of tasks divide by."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import ConfigError
from localgrad.task import Batch
from localgrad.tasks.normalisation import constant


def cross_entropy(
    logits: Tensor, batch: Batch, ignored: int, class_weights: tuple[float, ...] | None, smoothing: float
) -> Tensor:
    """The mean over targets that are not ``ignored``, by the weights of their classes; 0 where nothing counts."""
    key = (cross_entropy, ignored, class_weights)
    nothing = batch.of_targets(key, lambda targets: weight_of(targets, ignored, class_weights) <= 0)
    weights, targets = None, batch.targets
    if class_weights is not None:
        weights = constant(class_weights, logits.dtype, logits.device)
        targets = targets.masked_fill(nothing, ignored)  # else the gradient of nothing would be 0 / 0
    loss = F.cross_entropy(logits, targets, weights, ignore_index=ignored, label_smoothing=smoothing)
    return loss.masked_fill(nothing, 0.0)


def check_weights(class_weights: tuple[float, ...] | None, num_classes: int, smoothing: float) -> None:
    """Raise `ConfigError` unless there is a weight for each class, and none that makes a mean meaningless."""
    if class_weights is None:
        return
    if len(class_weights) != num_classes:
        raise ConfigError(
            f"class_weights has {len(class_weights)} entries; give one for each of the {num_classes} classes"
        )
    if not all(0 <= weight < float("inf") for weight in class_weights) or not sum(class_weights) > 0:
        raise ConfigError(f"class_weights={class_weights}; weights are at least 0, and one is positive")
    if smoothing > 0 and min(class_weights) == 0:
        raise ConfigError(
            f"class_weights={class_weights} with label_smoothing={smoothing}: a class of weight 0 would count in the "
            "smoothed loss and not in what it is divided by; give it a small weight, or leave smoothing out"
        )


def weight_of(targets: Tensor, ignored: int, class_weights: tuple[float, ...] | None) -> Tensor:
    """The number of entries that are not ``ignored``, each counted by the weight of its class."""
    counted = targets != ignored
    if class_weights is None:
        return counted.sum()
    weights = constant(class_weights, torch.float64, targets.device)
    return (weights[targets.where(counted, 0)] * counted).sum()


def balanced(
    loss: Tensor, batch: Batch, count: Callable[[Any], Tensor], key: Hashable = "targets", least: float = 0.0
) -> Tensor:
    """A loss that divides by ``max(count(targets), least)``, weighted so that parts and replicas add up.

    Counts of one ``key`` are equal; that of ``targets`` reads them alone.
    """
    factor = batch.balance(count, key, least)
    return loss if isinstance(factor, float) and factor == 1.0 else (loss * factor).to(loss.dtype)
