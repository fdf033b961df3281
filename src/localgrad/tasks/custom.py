"""Any other task, from its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localgrad.batches import map_tensors, num_samples
from localgrad.errors import ConfigError, TrainingError
from localgrad.losses.precision import widened
from localgrad.site import HeadBuilder
from localgrad.task import Batch, Metric
from localgrad.tasks.counting import balanced
from localgrad.tasks.normalisation import check_normalisation, pixels_of

Judge = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Custom:
    """A `localgrad.task.Task`; see `custom`."""

    of: Judge
    num_outputs: int
    scored: Judge | None = None
    evaluator: Callable[[], Metric] | None = None
    counted: Callable[[Any], Tensor] | None = None
    builder: HeadBuilder | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """The builder that was given, else what the method proposed."""
        return self.builder or proposed

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """What the given function returns for the output, its half precision widened, and the targets."""
        loss = self._of(output, batch.targets)
        return loss if self.counted is None else balanced(loss, batch, self.counted)

    def _of(self, output: Any, targets: Any) -> Tensor:
        loss = self.of(map_tensors(widened, output), targets)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            form = tuple(loss.shape) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TrainingError(
                f"the loss of a custom task returns {form}; it has to be a tensor of shape (): write .mean()"
            )
        return loss

    @torch.no_grad()
    def score(self, output: Any, targets: Any) -> Tensor:
        """What the given function returns, else ``exp(-loss)`` of the batch, limited to [0, 1], for each sample."""
        if self.scored is not None:
            return self.scored(output, targets)
        return torch.exp(-self._of(output, targets).float()).clamp(0.0, 1.0).expand(num_samples(output) or 1)

    def metric(self) -> Metric:
        """What the given function makes, else the mean score and the mean loss of samples."""
        return Means(self) if self.evaluator is None else self.evaluator()

    def pixels(self, inputs: Tensor) -> Tensor:
        """See `localgrad.tasks.normalisation.pixels_of`."""
        return pixels_of(inputs, self.mean, self.std)


class Means:
    """A `localgrad.task.Metric`: the score and the loss of a custom task, averaged over samples."""

    def __init__(self, task: Custom) -> None:
        self.task, self.samples = task, 0
        self.score: Tensor | float = 0.0
        self.loss: Tensor | float = 0.0

    @torch.no_grad()
    def update(self, output: Any, targets: Any) -> None:
        """Count one batch."""
        scores = self.task.score(output, targets)
        self.score = self.score + scores.double().sum()
        self.loss = self.loss + self.task._of(output, targets).double() * len(scores)
        self.samples += len(scores)

    def compute(self) -> dict[str, float]:
        """``score`` and ``loss``."""
        return {name: float(getattr(self, name)) / max(1, self.samples) for name in ("score", "loss")}


def custom(
    loss: Judge,
    num_outputs: int,
    *,
    score: Judge | None = None,
    metric: Callable[[], Metric] | None = None,
    counted: Callable[[Any], Tensor] | None = None,
    head: HeadBuilder | None = None,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> Custom:
    """A task from its loss alone.

    Args:
        loss: ``loss(output, targets)``, a scalar: the mean over samples, or over what ``counted`` says.
        num_outputs: width of what an auxiliary head answers, (B, num_outputs).
        score: ``score(output, targets)``, (B,) float32 in [0, 1]; None for ``exp(-loss)`` of the batch.
        metric: makes a fresh `localgrad.task.Metric`; None for the mean score and the mean loss.
        counted: ``counted(targets)``, what the loss divides by where that is no number of samples, so that
            micro-batches and replicas add up to the loss of the whole batch, see `localgrad.balance`.
        head: builds auxiliary heads, whatever classifier a method proposes; None for that.
        mean, std: what the inputs were normalised by, per channel in [0, 1] units; reconstruction losses undo it.

    Raises:
        ConfigError: a value outside its range.

    Example:
        >>> import torch, localgrad
        >>> task = localgrad.tasks.custom(torch.nn.functional.poisson_nll_loss, 1)
        >>> localgrad.methods.man(localgrad.methods.dgl(task)).name
        'man(dgl)'
    """
    if num_outputs < 1:
        raise ConfigError(f"num_outputs={num_outputs}; a custom task needs at least 1 output")
    for name, value in (("loss", loss), ("score", score), ("metric", metric), ("counted", counted), ("head", head)):
        if not callable(value) and (value is not None or name == "loss"):
            raise ConfigError(f"{name}={value!r}; a custom task takes a function, such as torch.nn.functional.mse_loss")
    check_normalisation(mean, std)
    return Custom(loss, num_outputs, score, metric, counted, head, tuple(mean), tuple(std))
