"""Regression: one or several numbers for each sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.errors import ConfigError, TrainingError, nearest
from localgrad.losses.precision import widened
from localgrad.site import HeadBuilder
from localgrad.task import Batch
from localgrad.tasks.normalisation import check_normalisation, pixels_of
from localgrad.tasks.targets import check_finite, require, values_of

_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


@dataclass(frozen=True)
class Regression:
    """A `localgrad.task.Task`; see `regression`."""

    num_outputs: int = 1
    distance: Literal["mse", "l1", "smooth_l1"] = "mse"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    read: set[torch.device] = field(default_factory=set, compare=False, repr=False)

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """What the method proposed."""
        return proposed

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The mean over samples and outputs of ``(f - y)^2``, ``|f - y|``, or the smooth form of the latter."""
        answers, targets = self.pair(output, batch.targets)
        check_finite(values_of(batch.targets, self.read), f"regression({self.num_outputs})")
        # Reduced apart: torch's own mean keeps the storage of all entries on a CPU, which planning would not foresee.
        return _LOSSES[self.distance](answers, targets, reduction="none").mean()

    def pair(self, output: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Answers and targets, both (B, num_outputs) and of one dtype.

        Raises:
            TrainingError: one of them has another shape.
        """
        n = self.num_outputs
        shapes = [(n,), ()] if n == 1 else [(n,)]
        allowed = f"(B, {n})" + " or (B,)" * (n == 1)
        if not isinstance(output, Tensor) or output.dim() == 0 or tuple(output.shape[1:]) not in shapes:
            form = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise TrainingError(
                f"the model returns {form}, but regression({n}) needs {allowed}; build the model with num_classes={n}"
            )
        fits = isinstance(targets, Tensor) and targets.shape[:1] == output.shape[:1]
        fits = fits and tuple(targets.shape[1:]) in shapes and not targets.is_complex() and targets.dtype != torch.bool
        require(
            fits, f"regression({n})", targets, f"numbers {allowed} with B = {len(output)}",
            "write targets.float(), a row of numbers for each sample, and a task with as many outputs",
        )  # fmt: skip
        answers = widened(output).reshape(-1, n)
        return answers, targets.reshape(-1, n).to(answers.dtype)

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """``1 - (f - y)^2 / var(y)`` of each sample over the variance in the batch, limited to [0, 1], (B,) float32."""
        answers, targets = self.pair(output, targets)
        variance = targets.var(0, correction=0).clamp(min=torch.finfo(targets.dtype).tiny)
        return (1.0 - (answers - targets).square() / variance).clamp(0.0, 1.0).mean(1).float()

    def metric(self) -> Deviation:
        """The share of the variance that is explained, and mean errors."""
        return Deviation(self)

    def pixels(self, inputs: Tensor) -> Tensor:
        """See `localgrad.tasks.normalisation.pixels_of`."""
        return pixels_of(inputs, self.mean, self.std)

    def blank(self, samples: int, shape: tuple[int, ...]) -> Tensor:
        """Targets for inputs ``(samples, *shape)``, to plan with."""
        return torch.zeros(samples, self.num_outputs)


class Deviation:
    """A `localgrad.task.Metric`: R^2, averaged over outputs and limited to [0, 1], mean absolute error and RMSE.

    ``R^2 = 1 - sum (f - y)^2 / sum (y - mean(y))^2`` over all samples; 1 for outputs that are right where ``y`` is
    constant. Errors are in the units of the targets.
    """

    def __init__(self, task: Regression) -> None:
        self.task = task
        self.answers: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, output: Tensor, targets: Tensor) -> None:
        """Count one batch: answers and targets as `Regression.pair` takes them."""
        answers, targets = self.task.pair(output, targets)
        self.answers.append(answers.double())
        self.targets.append(targets.double())

    def compute(self) -> dict[str, float]:
        """``r2``, ``mae`` and ``rmse``."""
        answers, targets = torch.cat(self.answers), torch.cat(self.targets)
        errors = answers - targets
        spread = (targets - targets.mean(0)).square().sum(0).clamp(min=torch.finfo(torch.float64).tiny)
        explained = (1.0 - errors.square().sum(0) / spread).mean().clamp(0.0, 1.0)
        figures = {"r2": explained, "mae": errors.abs().mean(), "rmse": errors.square().mean().sqrt()}
        return {name: float(value) for name, value in figures.items()}


def regression(
    num_outputs: int = 1,
    *,
    loss: Literal["mse", "l1", "smooth_l1"] = "mse",
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> Regression:
    """Answer each sample with ``num_outputs`` numbers.

    The model answers with (B, num_outputs), or (B,) for one output. Targets have either form, in any units; those of
    about mean 0 and variance 1 suit the learning rates that classification has.

    Args:
        num_outputs: at least 1.
        loss: ``mse``, ``l1`` or ``smooth_l1``, as torch.nn.functional has them.
        mean, std: what the inputs were normalised by, per channel in [0, 1] units; reconstruction losses undo it.

    Raises:
        ConfigError: a value outside its range.

    Example:
        >>> import torch, localgrad
        >>> task = localgrad.tasks.regression()
        >>> task.loss(torch.tensor([[1.0], [3.0]]), localgrad.Batch(None, torch.tensor([1.0, 1.0]), 0)).item()
        2.0
    """
    if num_outputs < 1:
        raise ConfigError(f"num_outputs={num_outputs}; regression needs at least 1 output")
    if loss not in _LOSSES:
        raise ConfigError(nearest(loss, _LOSSES, "loss of regression"))
    check_normalisation(mean, std)
    return Regression(num_outputs, loss, tuple(mean), tuple(std))
