"""A method is a value: which losses sit on a boundary, what they look through, which blocks they train, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from localgrad.errors import MethodError
from localgrad.layout import Layout, layout_of
from localgrad.spans import EndToEnd, Schedule, Span

if TYPE_CHECKING:
    from localgrad.partition import Chain, Cut, Partition


@dataclass(frozen=True)
class Batch:
    """What a loss may read besides the output of its head.

    Args:
        inputs: what the network was given, ``(B, C, H, W)`` for images, normalised.
        targets: what the task expects, ``(B,)`` class indices or ``(B, num_classes)`` probabilities for classification.
        step: optimizer steps done so far.
    """

    inputs: Any
    targets: Any
    step: int


class Task(Protocol):
    """What the network is trained to do: the loss and the score of an output, the model's own or an auxiliary one."""

    @property
    def num_outputs(self) -> int:
        """Width of the output of an auxiliary head."""

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The scalar loss of an output, averaged over the batch."""

    def score(self, output: Any, targets: Any) -> Tensor:
        """The score of each sample, ``(B,)`` float32 in [0, 1]; its mean is what is reported."""

    def pixels(self, inputs: Tensor) -> Tensor:
        """The images behind normalised ``inputs``, ``(B, C, H, W)`` in [0, 1]."""


@dataclass(frozen=True)
class Site:
    """A boundary at which an auxiliary network is to be built.

    Args:
        span: the span whose loss it serves; the features are those at boundary ``span.stop``.
        num_blocks: K.
        features: an example of them, as the model produced it.
        inputs: the example given to the model, ``(B, C, H, W)``.
        cut: the cut point, and ``partition`` the model it belongs to.
    """

    span: Span
    num_blocks: int
    features: Tensor
    inputs: Tensor
    cut: Cut
    partition: Partition | Chain

    @cached_property
    def layout(self) -> Layout:
        """Where channels, positions and prefix tokens lie in the features."""
        return layout_of(self.features, self.inputs, self.cut.channels_hint)

    @property
    def channels(self) -> int:
        """Width of the features."""
        return self.layout.channels

    @property
    def final_channels(self) -> int:
        """Width of the last features of the model that still have positions."""
        return self.partition.final_layout.channels

    @property
    def in_last_stage(self) -> bool:
        """Whether the features are at the model's last resolution."""
        return self.layout.grid == self.partition.final_layout.grid

    def next_units(self, count: int) -> tuple[nn.Module, ...]:
        """The model's own modules that run next, one for each of the following units, at most ``count``."""
        return self.partition.modules_after(self.cut)[:count]


@dataclass(frozen=True)
class Ramp:
    """A weight that runs linearly over the boundaries, from ``first`` at the first to ``last`` at the last one.

    ``first + (last - first) * k / (K - 2)`` at the boundary after block ``k``; ``first`` if there is only one.
    """

    first: float
    last: float

    def __call__(self, site: Site) -> float:
        inner = site.num_blocks - 2
        share = (site.span.stop - 1) / inner if inner > 0 else 0.0
        return self.first * (1.0 - share) + self.last * share


HeadBuilder = Callable[[Site], nn.Module]
BridgeBuilder = Callable[[Site], nn.Module]
Loss = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Term:
    """One loss of an auxiliary network: ``weight * loss(head(features), batch)``.

    Args:
        head: builds the head for a site.
        loss: scalar loss of the head's output, averaged over the batch.
        weight: a number, or a function of the site such as `Ramp`. Where it is 0 the head is not built.
        scored: whether the head's output is one the task can score (class logits, say).
    """

    head: HeadBuilder
    loss: Loss
    weight: float | Callable[[Site], float] = 1.0
    scored: bool = True

    def weight_at(self, site: Site) -> float:
        """The weight at one site; raises `MethodError` if it is negative or not a number."""
        weight = self.weight(site) if callable(self.weight) else self.weight
        if not weight >= 0:
            raise MethodError(f"a term has weight {weight} after block {site.span.stop - 1}; weights are at least 0")
        return float(weight)


@dataclass(frozen=True)
class Method:
    """How a network is trained. ``print(method)`` is the experiment.

    Args:
        name: how it was composed, ``"pgl(man(dgl))"``.
        task: the loss and score of the model's own head.
        terms: the losses of an auxiliary network.
        spans: which blocks each loss trains, step by step.
        bridge: builds what the heads of a site look through; None for nothing.
        checkpoint: recompute blocks whose activations would have to wait for a later block's backward pass.
        micro_batches: parts in which a batch is run, one after the other, gradients adding up.
    """

    name: str
    task: Task
    terms: tuple[Term, ...] = ()
    spans: Schedule = EndToEnd()  # noqa: RUF009 (frozen)
    bridge: BridgeBuilder | None = None
    checkpoint: bool = False
    micro_batches: int = 1


class Auxiliary(nn.Module):
    """The auxiliary network of one span: a bridge, and a head for each term whose weight there is not 0.

    Raises `MethodError` if every term has weight 0, since the span would then train nothing.
    """

    def __init__(self, method: Method, site: Site) -> None:
        super().__init__()
        weighted = [(term, term.weight_at(site)) for term in method.terms]
        self.terms = [(term, weight) for term, weight in weighted if weight > 0]
        if not self.terms:
            why = "the method has no terms" if not method.terms else "every term has weight 0 there"
            raise MethodError(
                f"{method.name}: span {site.span} ends inside the network but has no loss: {why}. "
                "Give a term a positive weight, or end the ramp above 0."
            )
        self.bridge = method.bridge(site) if method.bridge is not None else None
        if self.bridge is not None:
            self.bridge.to(site.features)
            with torch.no_grad():
                site = replace(site, features=self.bridge(site.features))
        self.heads = nn.ModuleList(term.head(site) for term, _ in self.terms)
        self.to(site.features)  # its device and precision

    def bridged(self, features: Tensor) -> Tensor:
        """What the heads read."""
        return features if self.bridge is None else self.bridge(features)

    def forward(self, features: Tensor) -> list[Any]:
        """The output of each head, in the order of ``terms``."""
        features = self.bridged(features)
        return [head(features) for head in self.heads]
