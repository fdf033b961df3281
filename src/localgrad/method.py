"""A method is a value: which losses sit on a boundary, what they look through, which blocks they train, and when."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from localgrad.errors import MethodError, nearest
from localgrad.layout import Layout, layout_of
from localgrad.recompute import Recompute, recompute_parts
from localgrad.rules import Rule
from localgrad.spans import EndToEnd, Local, Schedule, Span

if TYPE_CHECKING:
    from localgrad.network import LocalNetwork
    from localgrad.partition import Cut, Partition, Unit


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
            ``(B, H, W)`` class indices for segmentation; any nest of tensors with B rows and of lists with B entries.
        step: optimizer steps done so far.
        boundary: the one whose loss is computed, counted from 1; K for the model's own.
        context: what each of the method's `Context` made of this batch, by the context itself.
        joined: the rows (B, ...) of all replicas that share this batch, in order; the gradient reaches those of this
            one. A loss that compares samples with one another calls it on what it compares.
    """

    inputs: Any
    targets: Any
    step: int
    boundary: int = 0
    context: Mapping[Context, Any] = field(default_factory=dict)
    joined: Callable[[Tensor], Tensor] = alone


class Context(Hashable, Protocol):
    """Something computed once for a batch before the first block runs, without gradient: a teacher's answer, say.

    One that has nothing to do at some steps says so by a method ``rests(step)``.
    """

    def __call__(self, network: LocalNetwork, batch: Batch) -> Any:
        """What losses find in ``batch.context[self]``."""


class Metric(Protocol):
    """Scores a whole split: one object for each head, fed batch by batch."""

    def update(self, output: Any, targets: Any) -> None:
        """Count one batch: what the head answered in eval mode, and the targets as the loader gave them."""

    def compute(self) -> dict[str, float]:
        """Figures by name; the first, in [0, 1], is the score that is reported and selects the best epoch."""


class Task(Protocol):
    """What the network is trained to do. Methods and engine know a task by these members only.

    An output is what the model, or an auxiliary head, answers to a batch: a tensor, or a nest of them.
    """

    @property
    def num_outputs(self) -> int:
        """Width of what an auxiliary head answers: classes."""

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """The auxiliary head for this task, given the classifier that a method would put there.

        Its output is one that ``loss``, ``score`` and ``metric`` read as they read the model's own.
        """

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The scalar loss of an output, averaged over the batch."""

    def score(self, output: Any, targets: Any) -> Tensor:
        """What is shown while training: the score of each sample, ``(B,)`` float32 in [0, 1]."""

    def metric(self) -> Metric:
        """A fresh evaluator of a split."""

    def pixels(self, inputs: Tensor) -> Tensor:
        """The images behind normalised ``inputs``, ``(B, C, H, W)`` in [0, 1]."""


@dataclass(frozen=True)
class Site:
    """A boundary at which an auxiliary network is to be built.

    Args:
        span: the span whose loss it serves; the features are those at boundary ``span.stop``.
        num_blocks: K.
        features: an example of them, as the model produced it.
        inputs: the first tensor of the example given to the model, ``(B, C, H, W)`` for images.
        cut: the cut point, and ``partition`` the model it belongs to.
        patches: how many of these features lie side by side along each side of the whole ones.
    """

    span: Span
    num_blocks: int
    features: Tensor
    inputs: Tensor
    cut: Cut
    partition: Partition
    patches: int = 1

    @cached_property
    def layout(self) -> Layout:
        """Where channels, positions and prefix tokens lie in the features."""
        alike = self.features.dim() == len(self.cut.shape)  # a bridge may have made tokens of maps
        return layout_of(self.features, self.inputs, self.cut.channels_hint if alike else None)

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
        """Whether the features are at the model's last resolution, or below it."""
        final = self.partition.final_layout.grid
        return all(self.patches * a <= b for a, b in zip(self.layout.grid, final, strict=False))

    @cached_property
    def next_units(self) -> tuple[Unit, ...]:
        """The model's own modules that run next, from the first one that reads features of this width on.

        That is the one right after the boundary, unless a bridge has already led past it. None where what runs next
        also reads earlier features (a decoder with skips): a copy would need those too. They end where they cannot run
        one behind the other.

        Raises:
            MethodError: no later unit reads features of this width.
        """
        units = self.partition.units_after(self.cut)
        form = (self.layout.kind, self.layout.channels)
        start = next((k for k, unit in enumerate(units) if (unit.reads.kind, unit.reads.channels) == form), None)
        if units[0].reads_taps:
            return ()
        if start is None:
            raise MethodError(
                f"after block {self.span.stop - 1} a copy of a later unit should read features of shape "
                f"{tuple(self.features.shape)}, but none of {', '.join(unit.name for unit in units)} reads "
                f"{self.layout.channels} channels; leave out one of the plug-ins that look through later units"
            )
        alone = tuple(itertools.takewhile(lambda unit: not unit.reads_taps, units[start:]))
        return alone[: next((k for k, unit in enumerate(alone, start=1) if not unit.whole), len(alone))]

    @property
    def units_passed(self) -> int:
        """Units of the model that run before the boundary, the stem counted as one."""
        return self.partition.num_units - len(self.partition.units_after(self.cut))

    def beyond(self, bridge: nn.Module) -> Site:
        """The same site, seen through a bridge.

        Raises:
            MethodError: the bridge does not run on the features.
        """
        bridge.to(self.features).eval()
        try:
            with torch.no_grad():
                return replace(self, features=bridge(self.features))
        except Exception as error:  # a copied unit may fail in any way outside its place
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise MethodError(
                f"after block {self.span.stop - 1} copies of the model's own units (from {self.cut.name!r} on) "
                f"do not run on features of shape {tuple(self.features.shape)}: {reason}. Cut elsewhere, or "
                "use a method without a bridge"
            ) from error


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
BridgeBuilder = Callable[[Site], nn.Module | None]
# One that reads `Batch.inputs` says so by an attribute ``reads_inputs``: they have to be sent where blocks run on
# several ranks.
Loss = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Term:
    """One loss of an auxiliary network: ``weight * loss(head(features), batch)``.

    Args:
        head: builds the head for a site.
        loss: scalar loss of the head's output, averaged over the batch.
        weight: a number, or a function of the site such as `Ramp`. Where it is 0 the head is not built.
        scored: whether the head's output is one the task can score (class logits, say).
        every: it counts on every so many steps only; the others save its cost.
    """

    head: HeadBuilder
    loss: Loss
    weight: float | Callable[[Site], float] = 1.0
    scored: bool = True
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise MethodError(f"every={self.every}; a term counts every so many steps, at least 1")

    def weight_at(self, site: Site) -> float:
        """The weight at one site; raises `MethodError` if it is negative or not a number."""
        weight = self.weight(site) if callable(self.weight) else self.weight
        if not weight >= 0:
            raise MethodError(f"a term has weight {weight} after block {site.span.stop - 1}; weights are at least 0")
        return float(weight)


Wait = Literal["device", "host", "bf16"]


@dataclass(frozen=True)
class Accumulate:
    """How a batch is run in parts.

    Args:
        parts: micro-batches, one after the other, gradients adding up.
        wait: where the features of parts wait that have passed a block while others pass it: on the ``device``, on the
            ``host``, or on the host in ``bf16``, which rounds them.
    """

    parts: int = 1
    wait: Wait = "device"

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise MethodError(f"parts={self.parts}; accumulation needs at least 1 micro-batch")
        if self.wait not in get_args(Wait):
            raise MethodError(nearest(self.wait, get_args(Wait), "wait"))


@dataclass(frozen=True)
class Method:
    """How a network is trained. ``print(method)`` is the experiment.

    Args:
        name: how it was composed, ``"pgl(man(dgl))"``.
        task: the loss and score of the model's own head.
        terms: the losses of an auxiliary network.
        spans: which blocks each loss trains, step by step.
        bridge: builds what the heads of a site look through; None for nothing.
        recompute: what runs again in the backward pass instead of being kept.
        accumulate: the parts in which a batch is run.
        final_loss: of the model's own output; None for the task's.
        contexts: what is computed once for each batch.
        rules: what the method needs besides, see `localgrad.rules`.
    """

    name: str
    task: Task
    terms: tuple[Term, ...] = ()
    spans: Schedule = EndToEnd()  # noqa: RUF009 (frozen)
    bridge: BridgeBuilder | None = None
    recompute: Recompute = Recompute()  # noqa: RUF009 (frozen)
    accumulate: Accumulate = Accumulate()
    final_loss: Loss | None = None
    contexts: tuple[Context, ...] = ()
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        self.check_rules(6)

    @property
    def micro_batches(self) -> int:
        """Parts in which a batch is run."""
        return self.accumulate.parts

    def check_rules(self, num_blocks: int) -> None:
        """Raise `MethodError` if a rule does not go with the spans."""
        for rule in self.rules:
            rule.check(self, num_blocks)

    def work(self, num_blocks: int, step: int) -> Hashable:
        """What a step consists of: equal for steps that do the same, whatever their number."""
        resting = [context.rests(step) for context in self.contexts if hasattr(context, "rests")]
        return self.spans(num_blocks, step), tuple(step % term.every == 0 for term in self.terms), tuple(resting)

    def require_heads(self, plugin: str) -> None:
        """Raise `MethodError` for a plug-in that has nothing to act on because there are no auxiliary heads."""
        if not self.terms:
            raise MethodError(f"{plugin}({self.name}): {self.name} has no auxiliary heads; use a local base like dgl")

    def require_logits(self, plugin: str) -> None:
        """The same if no auxiliary head answers as the model does."""
        self.require_heads(plugin)
        if not any(term.scored for term in self.terms):
            raise MethodError(
                f"{plugin}({self.name}): no head of {self.name} answers with what the task scores, such as logits; use "
                "softmax instead of contrastive heads"
            )

    def require_local(self, plugin: str) -> Local:
        """The base's spans if they are local; raises `MethodError` if the base decides them otherwise."""
        if not isinstance(self.spans, Local):
            raise MethodError(
                f"{plugin}({self.name}): {self.name} already decides its spans; {plugin} needs a local base like dgl"
            )
        return self.spans


class Auxiliary(nn.Module):
    """The auxiliary network of one span: a bridge, and a head for each term whose weight there is not 0.

    Raises `MethodError` if every term has weight 0, since the span would then train nothing.
    """

    def __init__(self, method: Method, site: Site) -> None:
        super().__init__()
        weighted = [(term, term.weight_at(site)) for term in method.terms]
        self.terms = [(term, weight) for term, weight in weighted if weight > 0]
        if not any(term.every == 1 for term, _ in self.terms):
            why = "every term has weight 0 there" if method.terms else "the method has no terms"
            if self.terms:
                why = "on some steps every term rests"
            raise MethodError(
                f"{method.name}: span {site.span} ends inside the network but has no loss: {why}. "
                "Give a term a positive weight, or end the ramp above 0."
            )
        self.bridge = method.bridge(site) if method.bridge is not None else None
        if self.bridge is not None:
            site = site.beyond(self.bridge)
        heads = [(term, term.head(site)) for term, _ in self.terms]
        for rule in method.rules:
            heads = [(term, rule.built(term, head)) for term, head in heads]
        self.heads = nn.ModuleList(head for _, head in heads)
        if method.recompute.auxiliary:
            recompute_parts(self)
        self.to(site.features)  # its device and precision

    def bridged(self, features: Tensor) -> Tensor:
        """What the heads read."""
        own = next((p.dtype for p in self.parameters() if p.is_floating_point()), features.dtype)
        if features.dtype != own and not torch.is_autocast_enabled(features.device.type):
            features = features.to(own)  # the model left autocast before the cut
        return features if self.bridge is None else self.bridge(features)

    def forward(self, features: Tensor, step: int = 0) -> list[Any]:
        """The output of each head, in the order of ``terms``; None for those that rest at this step."""
        features = self.bridged(features)
        return [
            head(features) if step % term.every == 0 else None
            for (term, _), head in zip(self.terms, self.heads, strict=True)
        ]
