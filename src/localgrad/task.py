"""What a network is trained to do, and what a loss may read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from localgrad.balance import BalanceOf, whole
from localgrad.site import HeadBuilder


def alone(rows: Tensor) -> Tensor:
    """The rows of a batch that no other process has a share of."""
    return rows


@dataclass(frozen=True)
class Batch:
    """What a loss may read besides the output of its head.

    Args:
        inputs: what the network was given, ``(B, C, H, W)`` for images, normalised; a tuple or mapping for a model with
            several inputs.
        targets: what the task expects: ``(B,)`` class indices or ``(B, num_classes)`` probabilities for classification,
            ``(B, H, W)`` class indices for segmentation, see `localgrad.tasks` for others; any nest of tensors with B
            rows and of lists with B entries.
        step: optimizer steps done so far.
        boundary: the one whose loss is computed, counted from 1; K for the model's own.
        context: what each of the method's `localgrad.method.Context` made of this batch, by the context itself.
        balance: what a loss that is no mean over samples has to be multiplied by, so that micro-batches and replicas
            add up to the loss of the whole batch, see `localgrad.balance`.
        known: what `of_targets` has made.
        joined: the rows (B, ...) of all replicas that share this batch, in order; the gradient reaches those of this
            one. A loss that compares samples with one another calls it on what it compares.
    """

    inputs: Any
    targets: Any
    step: int
    boundary: int = 0
    context: Mapping[Hashable, Any] = field(default_factory=dict)
    joined: Callable[[Tensor], Tensor] = alone
    balance: BalanceOf = whole
    known: dict[Hashable, tuple[Any, Any]] = field(default_factory=dict, compare=False, repr=False)

    def of_targets(self, key: Hashable, make: Callable[[Any], Any]) -> Any:
        """``make(targets)``, called once for all losses of these targets that ask under the same ``key``."""
        found = self.known.get(key)
        if found is None or found[0] is not self.targets:
            found = self.known[key] = (self.targets, make(self.targets))
        return found[1]


class Metric(Protocol):
    """Scores a whole split: one object for each head, fed batch by batch."""

    def update(self, output: Any, targets: Any) -> None:
        """Count one batch: what the head answered in eval mode, and the targets as the loader gave them."""

    def compute(self) -> dict[str, float]:
        """Figures by name; the first, in [0, 1], is the score that is reported and selects the best epoch."""


@runtime_checkable
class Task(Protocol):
    """What the network is trained to do. Methods and engine know a task by these members only.

    Those that need more ask for a method that a task may have: ``counted(targets)``, what the loss divides by;
    ``logits(output)``, (B, C, ...) of distributions over classes, for soft targets; ``onehot(targets)``, (B, C), NaN
    for samples without a label, for similarity matching; ``blank(samples, shape)``, targets of no particular value for
    inputs ``(samples, *shape)``, for planning; ``rowwise``, True if an answer is a tensor (B, C) of which each row is
    scored by itself, so that those of all heads can be scored in one call.

    An output is what the model, or an auxiliary head, answers to a batch: a tensor, or a nest of them.
    """

    @property
    def num_outputs(self) -> int:
        """Width of what an auxiliary head answers: classes, labels, numbers."""

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """The auxiliary head for this task, given the classifier that a method would put there.

        Its output is one that ``loss``, ``score`` and ``metric`` read as they read the model's own.
        """

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The scalar loss of an output, averaged over the batch.

        One that is a mean over something else than samples multiplies it by ``batch.balance``. A task that has a method
        ``counted(targets)``, of what the loss divides by, can do so where blocks run on several ranks, too.
        """

    def score(self, output: Any, targets: Any) -> Tensor:
        """What is shown while training: the score of each sample, ``(B,)`` float32 in [0, 1]."""

    def metric(self) -> Metric:
        """A fresh evaluator of a split."""

    def pixels(self, inputs: Tensor) -> Tensor:
        """The images behind normalised ``inputs``, ``(B, C, H, W)`` in [0, 1]."""


# One that reads `Batch.inputs` says so by an attribute ``reads_inputs``: they have to be sent where blocks run on
# several ranks.
Loss = Callable[[Any, Batch], Tensor]
