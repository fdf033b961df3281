"""Image classification: cross-entropy, accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import ConfigError, TrainingError
from localgrad.losses.precision import widened
from localgrad.site import HeadBuilder
from localgrad.task import Batch
from localgrad.tasks.counting import balanced, check_weights, cross_entropy, weight_of
from localgrad.tasks.normalisation import check_normalisation, pixels_of
from localgrad.tasks.targets import CLASSES, check_classes, logits_of, require, values_of

IGNORED = -100  # PyTorch's default
TOLERANCE = 1e-2  # of probabilities, which may be in half precision


@dataclass(frozen=True)
class Classification:
    """A `localgrad.task.Task`; see `classification`."""

    num_classes: int
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    read: set[torch.device] = field(default_factory=set, compare=False, repr=False)
    rowwise: ClassVar[bool] = True

    @property
    def num_outputs(self) -> int:
        """Logits of an auxiliary head."""
        return self.num_classes

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """What the method proposed."""
        return proposed

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of logits (B, num_classes) with indices (B,) or probabilities (B, num_classes).

        Labels of -100 are ignored; 0 for a batch of nothing else.
        """
        logits, targets = widened(self.logits(output)), batch.targets
        batch.of_targets((self.check, len(logits)), lambda targets: self.check(targets, len(logits)))
        if targets.is_floating_point():  # a mean over samples
            weights = None if self.class_weights is None else logits.new_tensor(self.class_weights)
            return F.cross_entropy(logits, targets, weights, label_smoothing=self.label_smoothing)
        loss = cross_entropy(logits, batch, IGNORED, self.class_weights, self.label_smoothing)
        return balanced(loss, batch, self.counted)

    def check(self, targets: Any, samples: int) -> None:
        """Raise `TrainingError` unless targets are class indices (samples,) or probabilities (samples, num_classes)."""
        task, shape = f"classification({self.num_classes})", (samples, self.num_classes)
        indices = isinstance(targets, Tensor) and targets.dtype == torch.int64
        require(
            (indices and targets.shape == (samples,))
            or (isinstance(targets, Tensor) and targets.is_floating_point() and targets.shape == shape),
            task, targets,
            f"int64 class indices of shape ({samples},), or probabilities {shape}, float",
            f"{CLASSES}, targets.float() for one-hot rows, or tasks.regression for other numbers",
        )  # fmt: skip
        values = values_of(targets, self.read)
        if indices:
            check_classes(values, self.num_classes, IGNORED, task)
        elif values is not None:
            sums = values.sum(1, dtype=np.float64)
            if not ((abs(sums - 1) <= TOLERANCE).all() and (values >= -TOLERANCE).all()):
                raise TrainingError(
                    f"{task} was given rows that sum up to {sums.min():g} to {sums.max():g}; a row of it holds the "
                    f"probabilities of classes, which sum up to 1; where several classes hold at once, write "
                    f"tasks.multilabel({self.num_classes})"
                )

    def logits(self, output: Any) -> Tensor:
        """The logits (B, num_classes) that an output is.

        Raises:
            TrainingError: it is none.
        """
        output = logits_of(output)
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] != self.num_classes:
            form = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise TrainingError(
                f"the model returns {form}, but classification({self.num_classes}) needs "
                f"(B, {self.num_classes}); build the model with num_classes={self.num_classes}"
            )
        return output

    def onehot(self, targets: Tensor) -> Tensor:
        """Rows (B, num_classes) of indices or probabilities; NaN for a label that is ignored."""
        if targets.is_floating_point():
            return targets
        rows = F.one_hot(targets.clamp(min=0), self.num_classes).float()
        return rows.where((targets != IGNORED)[:, None], float("nan"))

    def counted(self, targets: Tensor) -> Tensor:
        """What the loss divides by: labels that are not ignored, each by the weight of its class."""
        if targets.is_floating_point():
            return torch.full((), len(targets), device=targets.device)
        return weight_of(targets, IGNORED, self.class_weights)

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """Whether each sample's largest logit is its class, (B,) float32; the likelier class of mixed targets.

        1 where the label is ignored.
        """
        labels = hard_labels(targets)
        return ((self.logits(output).argmax(1) == labels) | (labels == IGNORED)).float()

    def metric(self) -> Accuracy:
        """Accuracy over all images."""
        return Accuracy(self)

    def pixels(self, inputs: Tensor) -> Tensor:
        """See `localgrad.tasks.normalisation.pixels_of`."""
        return pixels_of(inputs, self.mean, self.std)

    def blank(self, samples: int, shape: tuple[int, ...]) -> Tensor:
        """Targets for inputs ``(samples, *shape)``, to plan with."""
        return torch.zeros(samples, dtype=torch.int64)


class Accuracy:
    """A `localgrad.task.Metric`: the share of images that are classified rightly, of those with a label."""

    def __init__(self, task: Classification) -> None:
        self.task = task
        self.right: Tensor | float = 0.0
        self.images: Tensor | int = 0

    def update(self, output: Tensor, targets: Tensor) -> None:
        """Count one batch: logits (B, num_classes), indices (B,) or probabilities (B, num_classes)."""
        counts = hard_labels(targets) != IGNORED
        self.right = self.right + (self.task.score(output, targets) * counts).sum()
        self.images = self.images + counts.sum()

    def compute(self) -> dict[str, float]:
        """``{"accuracy": ...}``."""
        return {"accuracy": float(self.right) / max(1, int(self.images))}


def hard_labels(targets: Tensor) -> Tensor:
    """Class indices (B,) of indices (B,) or of probabilities (B, num_classes)."""
    return targets.argmax(1) if targets.dim() == 2 else targets


def classification(
    num_classes: int,
    *,
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] | None = None,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> Classification:
    """Classify images into ``num_classes``.

    Args:
        num_classes: at least 2.
        label_smoothing: share of the target spread over all classes, for every head.
        class_weights: of the loss, one for each class; None for equal ones.
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
    check_weights(class_weights, num_classes, label_smoothing)
    check_normalisation(mean, std)
    weights = None if class_weights is None else tuple(class_weights)
    return Classification(num_classes, label_smoothing, weights, tuple(mean), tuple(std))
