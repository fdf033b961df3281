"""Multi-label classification: for each sample, which of several labels hold."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import ConfigError, TrainingError
from localgrad.losses.precision import widened
from localgrad.site import HeadBuilder
from localgrad.task import Batch
from localgrad.tasks.counting import balanced
from localgrad.tasks.normalisation import check_normalisation, pixels_of
from localgrad.tasks.targets import require, values_of

IGNORED = -1


@dataclass(frozen=True)
class Multilabel:
    """A `localgrad.task.Task`; see `multilabel`."""

    num_labels: int
    pos_weight: tuple[float, ...] | None = None
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    read: set[torch.device] = field(default_factory=set, compare=False, repr=False)
    rowwise: ClassVar[bool] = True

    @property
    def num_outputs(self) -> int:
        """Logits of an auxiliary head."""
        return self.num_labels

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """What the method proposed."""
        return proposed

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Binary cross-entropy of logits (B, num_labels), over all entries of the targets that are not -1.

        0 for a batch of nothing else.
        """
        logits, targets = widened(self._checked(output)), batch.targets
        batch.of_targets((self.check, len(logits)), lambda targets: self.check(targets, len(logits)))
        counts, weight = targets != IGNORED, self.pos_weight
        entries = F.binary_cross_entropy_with_logits(
            logits,
            targets.to(logits.dtype).where(counts, 0.0),
            counts.to(logits.dtype),
            reduction="sum",
            pos_weight=None if weight is None else logits.new_tensor(weight),
        )
        return balanced(entries / counts.sum().clamp(min=1), batch, self.counted)

    def counted(self, targets: Tensor) -> Tensor:
        """What the loss divides by: entries that are not ignored."""
        return (targets != IGNORED).sum()

    def check(self, targets: Any, samples: int) -> None:
        """Raise `TrainingError` unless targets are (samples, num_labels) floats in [0, 1], or -1."""
        shape, task = (samples, self.num_labels), f"multilabel({self.num_labels})"
        require(
            isinstance(targets, Tensor) and targets.shape == shape and targets.is_floating_point(), task, targets,
            f"{shape} floats, 1 where a label holds, 0 where it does not, -1 where that is not known",
            "write targets.float(), or tasks.classification for class indices (B,)",
        )  # fmt: skip
        values = values_of(targets, self.read)
        if values is not None and not (((values >= 0) & (values <= 1)) | (values == IGNORED)).all():
            raise TrainingError(
                f"{task} was given targets from {values.min():g} to {values.max():g}; it takes 0 to 1, and -1 for "
                "entries that are ignored; write NaN and other marks of unknown labels as -1"
            )

    def logits(self, output: Any) -> Tensor:
        """The logits (B, 2, num_labels) of each label not to hold and to hold."""
        logits = self._checked(output)
        return torch.stack([torch.zeros_like(logits), logits], 1)

    def onehot(self, targets: Tensor) -> Tensor:
        """Targets with 0.5 for what is not known."""
        return targets.where(targets != IGNORED, 0.5)

    def _checked(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] != self.num_labels:
            form = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise TrainingError(
                f"the model returns {form}, but multilabel({self.num_labels}) needs (B, {self.num_labels}); build the "
                f"model with num_classes={self.num_labels}"
            )
        return output

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """The share of each sample's labels that are told rightly, (B,) float32; 1 where none is known."""
        counts = targets != IGNORED
        wrong = (((output > 0) != (targets >= 0.5)) & counts).sum(1)
        return 1.0 - wrong / counts.sum(1).clamp(min=1)

    def metric(self) -> MeanAveragePrecision:
        """The mean average precision, and the share of entries told rightly."""
        return MeanAveragePrecision(self)

    def pixels(self, inputs: Tensor) -> Tensor:
        """See `localgrad.tasks.normalisation.pixels_of`."""
        return pixels_of(inputs, self.mean, self.std)

    def blank(self, samples: int, shape: tuple[int, ...]) -> Tensor:
        """Targets for inputs ``(samples, *shape)``, to plan with."""
        return torch.zeros(samples, self.num_labels)


class MeanAveragePrecision:
    """A `localgrad.task.Metric`: the area below precision over recall, averaged over the labels that occur.

    Targets of at least 0.5 hold. Source: computed by torchmetrics.
    """

    def __init__(self, task: Multilabel) -> None:
        try:
            from torchmetrics.classification import MultilabelAveragePrecision
        except ImportError as error:
            raise ConfigError("the average precision needs torchmetrics: pip install localgrad[multilabel]") from error
        self.task = task
        self.precision = MultilabelAveragePrecision(task.num_labels, average=None, ignore_index=IGNORED)
        self.right: Tensor | float = 0.0
        self.entries: Tensor | float = 0.0
        self.held: Tensor | float = 0.0  # how often each label does

    def update(self, output: Tensor, targets: Tensor) -> None:
        """Count one batch: logits (B, num_labels), targets (B, num_labels)."""
        counts, holds = targets != IGNORED, targets >= 0.5
        self.precision.to(output.device).update(widened(output).sigmoid(), holds.long().where(counts, IGNORED))
        self.right = self.right + (((output > 0) == holds) & counts).sum()
        self.entries = self.entries + counts.sum()
        self.held = self.held + holds.sum(0)

    def compute(self) -> dict[str, float]:
        """``map``, ``accuracy`` and ``ap/<label>`` of every label that occurs."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of labels that never hold
            found = self.precision.compute().double()
        names = self.task.classes or tuple(map(str, range(self.task.num_labels)))
        rows = zip(names, found, torch.as_tensor(self.held).expand(len(names)), strict=True)
        each = {f"ap/{name}": value.item() for name, value, held in rows if held > 0}
        accuracy = float(self.right) / max(1.0, float(self.entries))
        return {"map": sum(each.values()) / max(1, len(each)), "accuracy": accuracy, **each}


def multilabel(
    num_labels: int,
    *,
    pos_weight: tuple[float, ...] | None = None,
    classes: tuple[str, ...] = (),
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> Multilabel:
    """Say of each of ``num_labels`` labels whether it holds; any number of them may.

    Targets are (B, num_labels) floats: 1 where a label holds, 0 where it does not, a probability between, -1 where it
    is not known: such entries count neither in the loss nor in a score.

    Args:
        num_labels: at least 1.
        pos_weight: how much more an entry of 1 counts than one of 0, one for each label, as
            ``torch.nn.functional.binary_cross_entropy_with_logits`` takes it; None for equal weights.
        classes: names of the labels, for reports.
        mean, std: what the inputs were normalised by, per channel in [0, 1] units; reconstruction losses undo it.

    Raises:
        ConfigError: a value outside its range.

    Example:
        >>> import torch, localgrad
        >>> task = localgrad.tasks.multilabel(3)
        >>> task.score(torch.tensor([[2.0, -1.0, 5.0]]), torch.tensor([[1.0, 1.0, -1.0]])).item()
        0.5
    """
    if num_labels < 1:
        raise ConfigError(f"num_labels={num_labels}; multilabel needs at least 1 label")
    for name, value in (("pos_weight", pos_weight), ("classes", classes or None)):
        if value is not None and len(value) != num_labels:
            raise ConfigError(f"{name} has {len(value)} entries; give one for each of the {num_labels} labels")
    if not all(0 < weight < float("inf") for weight in pos_weight or ()):
        raise ConfigError(f"pos_weight={pos_weight}; weights are positive numbers")
    check_normalisation(mean, std)
    weights = None if pos_weight is None else tuple(pos_weight)
    return Multilabel(num_labels, weights, tuple(classes), tuple(mean), tuple(std))
