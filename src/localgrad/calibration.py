"""When a head is sure enough: temperatures, thresholds, and what accuracy and compute they come to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from localgrad.losses.precision import widened
from localgrad.measure.plots import BLUE, INK, ORANGE, drawing, label
from localgrad.measure.tables import markdown

NEVER = 2.0  # a threshold that no probability reaches
TEMPERATURES = (1 / 20, 20.0)
CANDIDATES = 200  # thresholds that are tried


def confidence(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """``max(softmax(z / T))`` (B,) float32, as thresholds are, of logits (B, C)."""
    return (widened(logits) / temperature).softmax(1).amax(1).float()


def fitted_temperature(logits: Tensor, targets: Tensor) -> float:
    """The T in `TEMPERATURES` with the least mean cross-entropy of ``z / T``.

    The cross-entropy is convex in ``b = 1 / T``; its derivative, ``mean(sum_c softmax(b z)_c z_c - z_target)``, is
    bisected. Heads that are right about everything end at the lowest T.

    Args:
        logits: (N, C).
        targets: (N,) class indices.

    Source: Guo et al., ICML 2017, arXiv:1706.04599.
    """
    logits = logits.double()
    right = logits.gather(1, targets[:, None]).mean()
    low, high = (torch.tensor(1 / t, dtype=torch.float64, device=logits.device).log() for t in TEMPERATURES[::-1])
    for _ in range(50):
        middle = (low + high) / 2
        slope = ((logits * middle.exp()).softmax(1) * logits).sum(1).mean() - right
        low, high = torch.where(slope > 0, low, middle), torch.where(slope > 0, middle, high)
    return float((-(low + high) / 2).exp())


@dataclass(frozen=True)
class Outcome:
    """How exits do on a split.

    Args:
        accuracy: in [0, 1].
        flops: that a sample takes, its heads included, 2 per multiply-add; the mean over the split.
        shares: of the samples, answered by each exit.
        thresholds: of each exit but the last.
    """

    accuracy: float
    flops: float
    shares: tuple[float, ...]
    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class Answered:
    """What E exits answered to N samples, each to all of them.

    Args:
        right: (E, N) whether the largest logit was the class.
        confidence: (E - 1, N) of each exit but the last.
        flops: (E,) that a sample takes to each exit, heads on its way included.
    """

    right: Tensor
    confidence: Tensor
    flops: Tensor

    def outcome(self, thresholds: Tensor) -> Outcome:
        """Accuracy and compute if each sample is answered by the first exit whose confidence reaches its threshold."""
        last = torch.ones_like(self.right[:1])
        first = torch.cat([self.confidence >= thresholds[:, None], last]).int().argmax(0)  # the first of equal ones
        exits, samples = self.right.shape
        shares = first.bincount(minlength=exits).double() / samples
        accuracy = self.right.gather(0, first[None]).double().mean()
        flops = float(shares @ self.flops)
        return Outcome(float(accuracy), flops, tuple(shares.tolist()), tuple(thresholds.tolist()))

    def cheapest(self, points: float) -> Tensor:
        """The threshold, one for all exits, with the least compute that loses at most ``points`` percentage points.

        One for each exit would take up to 0.1 less compute, at accuracies that other samples do not bear out
        (docs/exits.md).
        """
        least = float(self.right[-1].double().mean()) - points / 100 - 1e-9
        known = self.confidence.flatten().sort().values
        places = torch.linspace(0, len(known) - 1, CANDIDATES, device=known.device).long()
        tried = [torch.full_like(self.confidence[:, 0], float(one)) for one in (*known[places], NEVER)]
        return min(
            (one for one in tried if self.outcome(one).accuracy >= least), key=lambda one: self.outcome(one).flops
        )


@dataclass(frozen=True)
class Curve:
    """Accuracy against compute on one split, thresholds chosen on another.

    Args:
        boundaries: the block behind which each exit reads, from 1.
        heads: accuracy of each exit alone.
        flops: that a sample takes through the blocks to each exit and its head, without the other heads; last the model
            alone.
        points: percentage points that were allowed to be lost, for each of ``outcomes``.
    """

    boundaries: tuple[int, ...]
    heads: tuple[float, ...]
    flops: tuple[float, ...]
    points: tuple[float, ...]
    outcomes: tuple[Outcome, ...]

    def table(self) -> str:
        """Markdown: a row for each of ``points``, compute as a share of the model's alone."""
        answered = [f"by block {boundary}" for boundary in self.boundaries[:-1]]
        head = ["points to lose", "accuracy", "to the model", "compute", *answered, "by the model"]
        lines = [head]
        for points, found in zip(self.points, self.outcomes, strict=True):
            lost = 100 * (found.accuracy - self.heads[-1])
            shares = [f"{share:.1%}" for share in found.shares]
            compute = f"{found.flops / self.flops[-1]:.2f}"
            lines.append([f"{points:g}", f"{found.accuracy:.2%}", f"{lost:+.2f}", compute, *shares])
        return "\n".join(markdown(lines, ()))

    def picture(self, path: Path) -> None:
        """Draw accuracy against compute: the exits, each head alone, and the model."""
        outcomes = sorted(self.outcomes, key=lambda found: found.flops)
        compute = [found.flops / self.flops[-1] for found in outcomes]
        accuracy = [100 * found.accuracy for found in outcomes]
        alone = [(flops / self.flops[-1], 100 * score) for flops, score in zip(self.flops, self.heads, strict=True)]
        *prefixes, model = alone
        with drawing(path, height=4.0) as (_, (axis,)):
            axis.plot(compute, accuracy, color=BLUE, marker="o", markersize=5, linewidth=1.8, label="exits")
            axis.scatter(*zip(*prefixes, strict=True), color=ORANGE, marker="s", s=36, zorder=3,
                         label="a prefix and its head")  # fmt: skip
            axis.scatter(*model, color=INK, marker="*", s=110, zorder=4, label="the model")
            axis.axhline(model[1], color=INK, linewidth=0.8, linestyle=":")
            axis.set_xlabel("FLOPs of a sample, the model's = 1")
            axis.set_ylabel("accuracy, %")
            axis.set_xlim(left=0)
            axis.legend(loc="lower right")
            label(axis, prefixes, [f"block {boundary}" for boundary in self.boundaries[:-1]])
