"""Semantic segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad import heads
from localgrad.errors import ConfigError, TrainingError
from localgrad.layout import LAYERS
from localgrad.losses.precision import widened
from localgrad.site import HeadBuilder
from localgrad.task import Batch
from localgrad.tasks.counting import balanced, check_weights, cross_entropy, weight_of
from localgrad.tasks.normalisation import check_normalisation, pixels_of
from localgrad.tasks.targets import CLASSES, check_classes, require, values_of


@dataclass(frozen=True)
class Segmentation:
    """A `localgrad.task.Task`; see `segmentation`."""

    num_classes: int
    ignore_index: int = 255
    class_weights: tuple[float, ...] | None = None
    auxiliary: float = 0.5
    label_smoothing: float = 0.0
    head_width: int | None = None
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    read: set[torch.device] = field(default_factory=set, compare=False, repr=False)

    @property
    def num_outputs(self) -> int:
        """Logits at each position."""
        return self.num_classes

    @property
    def values(self) -> int:
        """How many a mask has besides the ignored one: background and foreground where there is one class."""
        return max(2, self.num_classes)

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """`localgrad.heads.FCN`, whatever classifier the method proposed."""
        return heads.FCN(self.num_classes, self.head_width)

    def logits(self, output: Any) -> Tensor:
        """The logits (B, num_classes, h, w) of an output, (B, num_classes, l) of signals and so on.

        Of one class they are (B, 2, h, w): of background, which is 0, and of foreground.

        Raises:
            TrainingError: it holds none.
        """
        logits = output.get("out") if isinstance(output, Mapping) else output
        if not isinstance(logits, Tensor) or not 3 <= logits.dim() <= 5 or logits.shape[1] != self.num_classes:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(output).__name__}"
            raise TrainingError(
                f"the model returns {found}, but segmentation({self.num_classes}) needs (B, {self.num_classes}, h, w), "
                "or a mapping that holds them as 'out'; build the model with that number of classes"
            )
        return logits if self.num_classes > 1 else torch.cat([torch.zeros_like(logits), logits], 1)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Cross-entropy of logits, resized to the masks (B, H, W), over all pixels that are not ignored.

        ``cross_entropy(out) + auxiliary * cross_entropy(aux)`` for a mapping that holds ``aux`` besides ``out``, as
        torchvision's models return it; 0 for a batch in which every pixel is ignored. With one class this is the binary
        cross-entropy of its logit.
        """
        logits = self.logits(output)
        batch.of_targets((self.check, logits.dim(), len(logits)), lambda masks: self.check(masks, logits))
        loss = self._cross_entropy(logits, batch)
        if isinstance(output, Mapping) and "aux" in output:
            loss = loss + self.auxiliary * self._cross_entropy(self.logits(output["aux"]), batch)
        return balanced(loss, batch, self.counted)

    def check(self, masks: Any, logits: Tensor) -> None:
        """Raise `TrainingError` unless there is a mask of classes for each output."""
        task = f"segmentation({self.num_classes})"
        fits = isinstance(masks, Tensor) and masks.dim() == logits.dim() - 1 and len(masks) == len(logits)
        require(
            fits and masks.dtype == torch.int64, task, masks,
            f"int64 masks (B, H, W), as many sides as the logits have, one for each of {len(logits)} images", CLASSES,
        )  # fmt: skip
        check_classes(values_of(masks, self.read), self.values, self.ignore_index, task)

    def counted(self, targets: Tensor) -> Tensor:
        """What the loss divides by: pixels that are not ignored, each by the weight of its class."""
        return weight_of(targets, self.ignore_index, self.class_weights)

    def _cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        logits = resized(widened(logits), batch.targets.shape[1:])
        return cross_entropy(logits, batch, self.ignore_index, self.class_weights, self.label_smoothing)

    def score(self, output: Any, targets: Tensor) -> Tensor:
        """The share of each image's pixels that are classified rightly, (B,) float32; 1 where all are ignored.

        Taken at the grid of the output, from the masks' nearest pixels there, which saves resizing the logits.
        """
        predicted = self.logits(output).argmax(1)
        masks = F.interpolate(targets[:, None].float(), size=predicted.shape[1:]).long()[:, 0]
        counted = masks != self.ignore_index
        wrong = ((predicted != masks) & counted).flatten(1).sum(1)
        return 1.0 - wrong / counted.flatten(1).sum(1).clamp(min=1)

    def metric(self) -> IntersectionOverUnion:
        """IoU of each class, at the size of the masks."""
        return IntersectionOverUnion(self)

    def pixels(self, inputs: Tensor) -> Tensor:
        """See `localgrad.tasks.normalisation.pixels_of`."""
        return pixels_of(inputs, self.mean, self.std)

    def blank(self, samples: int, shape: tuple[int, ...]) -> Tensor:
        """Masks for inputs ``(samples, *shape)``, to plan with."""
        return torch.zeros(samples, *shape[-2:], dtype=torch.int64)


class IntersectionOverUnion:
    """A `localgrad.task.Metric`: from the confusion matrix of all pixels of the split that are not ignored.

    ``IoU_c = TP_c / (TP_c + FP_c + FN_c)``. A class that occurs neither in the masks nor in the answers has none and is
    left out of the mean, as is the background of one class.

    Source: Everingham et al., PASCAL VOC, IJCV 2010; the confusion matrix is torchmetrics'.
    """

    def __init__(self, task: Segmentation) -> None:
        try:
            from torchmetrics.classification import MulticlassConfusionMatrix
        except ImportError as error:
            raise ConfigError("the IoU needs torchmetrics: pip install localgrad[segmentation]") from error
        self.task = task
        self.confusion = MulticlassConfusionMatrix(task.values, ignore_index=task.ignore_index)

    def update(self, output: Any, targets: Tensor) -> None:
        """Count one batch: logits (B, num_classes, h, w), masks (B, H, W)."""
        logits = resized(widened(self.task.logits(output)), targets.shape[1:])
        self.confusion.to(logits.device).update(logits.argmax(1), targets)

    def compute(self) -> dict[str, float]:
        """``miou``, ``pixel_accuracy`` and ``iou/<class>`` of every class that occurs."""
        matrix = self.confusion.compute().double()  # rows: what is there
        right, union = matrix.diag(), matrix.sum(0) + matrix.sum(1) - matrix.diag()
        first = self.task.values - self.task.num_classes
        names = self.task.classes or tuple(str(k) for k in range(first, self.task.values))
        each = zip(names, right[first:], union[first:], strict=True)
        found = {f"iou/{name}": (a / b).item() for name, a, b in each if b > 0}
        accuracy = (right.sum() / matrix.sum().clamp(min=1)).item()
        return {"miou": sum(found.values()) / max(1, len(found)), "pixel_accuracy": accuracy, **found}


def resized(logits: Tensor, size: Any) -> Tensor:
    """Logits (B, C, h, w) at ``size`` (H, W), bilinear, corners not aligned; the same tensor if they have it.

    Those of signals and volumes likewise.

    Raises:
        TrainingError: the masks have another number of sides.
    """
    if logits.shape[2:] == size:
        return logits
    if len(size) != logits.dim() - 2:
        raise TrainingError(
            f"logits of shape {tuple(logits.shape)} for masks of {tuple(size)} positions; give masks as many sides: "
            "(B, H, W) for images, (B, L) for signals, (B, D, H, W) for volumes"
        )
    return F.interpolate(logits, size=tuple(size), mode=LAYERS[len(size)].resize, align_corners=False)


def segmentation(
    num_classes: int,
    *,
    ignore_index: int = 255,
    class_weights: tuple[float, ...] | None = None,
    auxiliary: float = 0.5,
    label_smoothing: float = 0.0,
    head_width: int | None = None,
    classes: tuple[str, ...] = (),
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> Segmentation:
    """Give every pixel one of ``num_classes`` classes; with one class, say where it is.

    The model answers with logits (B, num_classes, h, w) on any grid, or with a mapping that holds them as ``out`` and
    those of its own auxiliary classifier as ``aux``. Targets are masks (B, H, W), int64. Signals (B, C, L) have logits
    (B, num_classes, l) and masks (B, L), volumes (B, C, D, H, W) one side more than images.

    Args:
        num_classes: at least 1; of one class masks hold 0, the background, and 1.
        ignore_index: pixels of this class count neither in the loss nor in a score.
        class_weights: one for each class, as ``torch.nn.functional.cross_entropy`` takes them; for background and
            foreground where there is one class.
        auxiliary: weight of the model's own ``aux`` output.
        label_smoothing: share of the target spread over all classes, for every head.
        head_width: of auxiliary heads, see `localgrad.heads.FCN`.
        classes: their names, for reports.
        mean, std: what the inputs were normalised by, per channel in [0, 1] units; reconstruction losses undo it.

    Raises:
        ConfigError: a value outside its range.

    Example:
        >>> import localgrad
        >>> task = localgrad.tasks.segmentation(19)
        >>> method = localgrad.methods.man_pp(localgrad.methods.dgl(task))

    Source: the loss and the weight of ``aux`` are those of torchvision's segmentation references.
    Differs: logits may be on a coarser grid than the masks; they are resized with corners not aligned, as torchvision's
    models do (InfoPro's released code aligns them).
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes={num_classes}; segmentation needs at least 1 class")
    values = max(2, num_classes)
    if 0 <= ignore_index < values:
        raise ConfigError(f"ignore_index={ignore_index} is one of the {values} classes of a mask; use 255 or -100")
    if classes and len(classes) != num_classes:
        raise ConfigError(f"classes has {len(classes)} entries; give one for each of the {num_classes} classes")
    if not auxiliary >= 0:
        raise ConfigError(f"auxiliary={auxiliary}; a weight is at least 0")
    if not 0.0 <= label_smoothing < 1.0:
        raise ConfigError(f"label_smoothing={label_smoothing}; it must be at least 0 and below 1")
    check_weights(class_weights, values, label_smoothing)
    check_normalisation(mean, std)
    weights = None if class_weights is None else tuple(class_weights)
    return Segmentation(
        num_classes, ignore_index, weights, auxiliary, label_smoothing, head_width, tuple(classes), tuple(mean),
        tuple(std),
    )  # fmt: skip
