"""Losses and scores of every head, summed on the device and read when they are shown."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from localgrad.batches import num_samples
from localgrad.data.loaders import Loader
from localgrad.engine import local_outputs
from localgrad.errors import TrainingError
from localgrad.method import Term
from localgrad.network import LocalNetwork
from localgrad.spans import Span
from localgrad.task import Batch, Metric, Task


class Meter:
    """Mean loss and score of each head. Heads are named by the boundary they read, ``block 1`` being after block 1."""

    def __init__(self, network: LocalNetwork) -> None:
        self.task: Task = network.method.task
        self.num_blocks = network.num_blocks
        self.device = network.device
        patterns = network.method.spans.patterns(self.num_blocks)
        spans = sorted({s for pattern in patterns for s in pattern}, key=lambda span: (span.stop, -span.start))
        self.names = list(dict.fromkeys(map(self.name, spans)))
        # Sums of single-precision losses are exact in double precision: the same ones in any order, on any ranks.
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.losses, self.scores = (torch.zeros(len(self.names), dtype=self.dtype, device=self.device) for _ in "ab")
        # A head need not answer at every step, so each is averaged over the batches and samples it has seen.
        self.batches: dict[str, int] = {}
        self.samples: dict[str, int] = {}
        self._answered: set[str] = set()
        # Of the step at hand.
        self._losses: list[tuple[str, Tensor]] = []
        self._scores: list[tuple[str, Tensor]] = []
        self._outputs: list[tuple[str, Tensor, Tensor]] = []
        self._places: dict[tuple[tuple[str, int], ...], Tensor] = {}

    def name(self, span: Span) -> str:
        """``block 3`` for the loss after block 3 (counted from 1), ``blocks 3-4`` for one over two, ``model`` last."""
        if span.stop == self.num_blocks:
            return "model"
        return f"block {span.stop}" if span.stop - span.start == 1 else f"blocks {span.start + 1}-{span.stop}"

    def add_loss(self, span: Span, loss: Tensor) -> None:
        """Add the loss of one span of one micro-batch."""
        name = self.name(span)
        self._answered.add(name)
        self._losses.append((name, loss.detach()))

    def add_output(self, span: Span, term: Term | None, output: Any, targets: Any) -> None:
        """Add the scores of one head on one batch."""
        if term is not None and not term.scored:
            return
        name = self.name(span)
        if getattr(self.task, "rowwise", False):
            self._outputs.append((name, output, targets))
            samples = len(output)
        else:
            scores = self.task.score(output, targets)
            self._scores.append((name, scores))
            samples = len(scores)
        self.samples[name] = self.samples.get(name, 0) + samples

    def add_up(self) -> None:
        """Add what heads have told since the last call to the sums: a few operations on the device, of all heads."""
        if self._outputs:
            names, outputs, targets = zip(*self._outputs, strict=True)
            scores = self.task.score(torch.cat(outputs), torch.cat(targets))
            self._add(self.scores, tuple(zip(names, map(len, outputs), strict=True)), scores)
        if self._scores:
            names, several = zip(*self._scores, strict=True)
            self._add(self.scores, tuple(zip(names, map(len, several), strict=True)), torch.cat(several))
        if self._losses:
            names, losses = zip(*self._losses, strict=True)
            self._add(self.losses, tuple((name, 1) for name in names), torch.stack(losses))
        self._forget_step()

    def _forget_step(self) -> None:
        for told in (self._outputs, self._scores, self._losses):
            told.clear()

    def _add(self, sums: Tensor, heads: tuple[tuple[str, int], ...], values: Tensor) -> None:
        """Add ``values``, so many of each head, in place: a captured step adds to the same tensors at each replay."""
        if heads not in self._places:  # moved to the device once, which a captured step could not do
            places = [self.names.index(name) for name, length in heads for _ in range(length)]
            self._places[heads] = torch.tensor(places, device=self.device)
        sums.index_add_(0, self._places[heads], values.to(self.dtype))

    def counts(self) -> tuple[dict[str, int], set[str]]:
        """Samples that each head has answered so far, and the heads that had a loss in this batch."""
        return dict(self.samples), set(self._answered)

    def recount(self, counts: tuple[dict[str, int], set[str]]) -> None:
        """Forget what was counted after ``counts``, and what heads have told since."""
        self.samples, self._answered = dict(counts[0]), set(counts[1])
        self._forget_step()

    def count_again(self, before: tuple[dict[str, int], set[str]], after: tuple[dict[str, int], set[str]]) -> None:
        """Count what one step counted between ``before`` and ``after``, for a replay that only the device has run."""
        self._answered |= after[1]
        for name, samples in after[0].items():
            self.samples[name] = self.samples.get(name, 0) + samples - before[0].get(name, 0)

    def reset(self) -> None:
        """Begin anew, in the same tensors."""
        self.losses.zero_()
        self.scores.zero_()
        self.batches.clear()
        self.samples.clear()

    def end_batch(self) -> None:
        """Count one batch for every head that had a loss."""
        for name in self._answered:
            self.batches[name] = self.batches.get(name, 0) + 1
        self._answered.clear()

    def check_finite(self, step: int) -> None:
        """Raise `TrainingError` if a loss was NaN or infinite."""
        for name, loss in zip(self.names, self.losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of {name} is {loss} at step {step}; training stopped and the last checkpoint is "
                    "untouched. Lower optim.lr, set optim.clip_grad=1.0 or use train.precision=fp32"
                )

    def read(self) -> dict[str, dict[str, float]]:
        """``{"loss": {head: mean}, "score": {head: mean}}``; waits for the device."""
        sums = self.state_dict()
        return {
            "loss": _means(sums["losses"], self.batches),
            "score": _means(sums["scores"], self.samples),
        }

    def state_dict(self) -> dict[str, Any]:
        """Sums so far as numbers, for a checkpoint in mid-epoch or other ranks; waits for the device."""
        return {
            "losses": dict(zip(self.names, self.losses.tolist(), strict=True)),
            "scores": dict(zip(self.names, self.scores.tolist(), strict=True)),
            "batches": dict(self.batches),
            "samples": dict(self.samples),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put `state_dict` back."""
        for sums, kind in ((self.losses, "losses"), (self.scores, "scores")):
            sums.copy_(torch.tensor([state[kind].get(name, 0.0) for name in self.names], dtype=self.dtype))
        self.batches, self.samples = dict(state["batches"]), dict(state["samples"])


def _means(sums: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    return {name: total / counts[name] for name, total in sums.items() if counts.get(name)}


@torch.no_grad()
def evaluate(network: LocalNetwork, batches: Any, autocast: torch.dtype | None = None) -> dict[str, dict[str, float]]:
    """Score every head and the model's own on a split, in eval mode, by the task's metric.

    Args:
        network: left in the mode it was in.
        batches: a loader of `localgrad.data`, or any iterable of (inputs, targets).
        autocast: dtype, None for full precision.

    Returns:
        ``{"loss": {"model": ...}, "score": {head: ...}, "metrics": {...}}``; loss and metrics are the model's own, the
        first of these being its score.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    meter, metrics = Meter(network), dict[str, Metric]()
    loss, samples = torch.zeros((), device=meter.device), 0
    try:
        for inputs, targets in batches.epoch(0) if isinstance(batches, Loader) else batches:
            inputs, targets = tree_map_only(Tensor, lambda t: t.to(meter.device), (inputs, targets))
            for span, term, output in local_outputs(network, inputs, autocast=autocast, scored_only=True):
                metrics.setdefault(meter.name(span), meter.task.metric()).update(output, targets)
                if term is None:
                    size = num_samples(inputs) or 1
                    loss += meter.task.loss(output, Batch(inputs, targets, 0)).float() * size
                    samples += size
    finally:
        for module, mode in modes.items():
            module.training = mode
    losses, found = agreed(
        network,
        {"model": loss.item() / samples} if samples else {},
        {name: metric.compute() for name, metric in metrics.items()},
    )
    return {
        "loss": losses,
        "score": {name: next(iter(figures.values())) for name, figures in found.items()},
        "metrics": found["model"],
    }


def agreed(network: LocalNetwork, *figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of all ranks that train ``network``, by name, for every rank; those that know the same one agree."""
    if network.stage is None and network.replicas is None:
        return list(figures)
    from localgrad.distributed.agreement import everyone, gather_text

    rows = [json.loads(row) for row in gather_text(everyone(), json.dumps(figures))]
    return [{name: value for known in part for name, value in known.items()} for part in zip(*rows, strict=True)]


def merged(network: LocalNetwork, meter: Meter) -> Meter:
    """The meters of all ranks that train ``network``, as one that every rank gets; ``meter`` where there is only it."""
    if network.stage is None and network.replicas is None:
        return meter
    from localgrad.distributed.agreement import everyone, gather_text

    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in gather_text(everyone(), json.dumps(meter.state_dict())):
        for kind, values in json.loads(row).items():
            sums[kind].update(values)
    total = Meter(network)
    total.load_state_dict(sums)
    return total
