"""A method is a value: which losses sit on a boundary, what they look through, which blocks they train, and when.

A `Rule` is what single methods need beyond spans, terms and bridges; implementations live in their method's file. For
each micro-batch it begins an `Observer`, which the engine tells what happens, in this order for each block: ``enter``
the features, ``during`` the block, ``measured``, then for each span that ends there ``answer`` and ``term_loss`` for
each head, and ``total``.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from localgrad.errors import MethodError, nearest
from localgrad.partition import Cut, Partition
from localgrad.recompute.parts import Recompute, recompute_parts
from localgrad.site import BridgeBuilder, HeadBuilder, Site, Weight
from localgrad.spans import EndToEnd, Local, Schedule, Span
from localgrad.task import Batch, Loss, Task


class Network(Protocol):
    """What rules and contexts may read of a `localgrad.network.LocalNetwork`."""

    model: nn.Module

    @property
    def running(self) -> nn.Module:
        """What was analysed: the model, or the list of modules given for it."""

    @property
    def num_blocks(self) -> int:
        """K."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    def spans(self, step: int) -> tuple[Span, ...]:
        """The spans of one step."""


class Context(ABC):
    """Something computed once for a batch before the first block runs, without gradient: a teacher's answer, say."""

    @abstractmethod
    def __call__(self, network: Network, batch: Batch) -> Any:
        """What losses find in ``batch.context[self]``."""

    def rests(self, step: int) -> bool:
        """Whether there is nothing to do at ``step``."""
        return False


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
    weight: Weight = 1.0
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


class Observer:
    """What a rule does in one micro-batch; by default nothing.

    Attributes:
        joins: keep block and head in one graph, so that the loss can be differentiated by the block's input, twice.
    """

    joins = False

    def enter(self, features: Tensor) -> Tensor:
        """The features, cut from their graph, as the next block is to read them."""
        return features

    def during(self, block: int) -> contextlib.AbstractContextManager[Any]:
        """Around the forward of a block."""
        return contextlib.nullcontext()

    def measured(self, block: int) -> Tensor | None:
        """A scalar found inside a block, which is added to every loss at its end."""
        return None

    def answer(self, boundary: int, term: Term, weight: float, output: Any, batch: Batch) -> Any:
        """What a head answered, as its loss and whoever watches are to read it."""
        return output

    def term_loss(self, boundary: int, term: Term | None, loss: Tensor, output: Any, batch: Batch) -> Tensor:
        """The loss of one head, or of the model's own output (``term`` None)."""
        return loss

    def total(self, boundary: int, total: Tensor, losses: Mapping[int, Tensor], features: Any, batch: Batch) -> Tensor:
        """The loss of a span; ``losses`` are those of its terms, by the identity of the term."""
        return total

    def reached(self) -> bool | None:
        """Whether the caller's backward pass came through the last loss; None if the boundary tells."""
        return None


class Rule:
    """What a method needs besides; subclasses are frozen dataclasses.

    Attributes:
        travels: whether it works where blocks run on several ranks; ``reason`` says why not.
        late: whether some heads get their gradients from the losses at the next boundary.
        joins: whether its observers may join block and head, and differentiate them twice.
    """

    travels: ClassVar[bool] = False
    late: ClassVar[bool] = False
    joins: ClassVar[bool] = False
    reason: ClassVar[str] = ""

    def check(self, method: Method, num_blocks: int) -> None:
        """Raise `MethodError` if the rule does not go with the method's spans."""

    def bound(self, partition: Partition, cuts: Sequence[Cut]) -> Rule:
        """The rule for one network; raises `MethodError` if the network lacks what it needs."""
        return self

    def observe(self, network: Network, batch: Batch) -> Observer:
        """What follows one micro-batch."""
        raise NotImplementedError

    def built(self, term: Term, head: nn.Module) -> nn.Module:
        """A head as it is to stand in an auxiliary network."""
        return head

    def tried(self, network: Network, example: Any) -> None:
        """Raise `MethodError` if a step on the example, in training mode, shows that the network does not allow it."""

    def late_parameters(self, auxiliary: Auxiliary) -> Iterable[nn.Parameter]:
        """Parameters of an auxiliary network that the losses at the next boundary train."""
        return ()


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
        rules: what the method needs besides, see `Rule`.
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

    def __str__(self) -> str:
        """The experiment: what differs from the defaults, a term a line. ``repr`` is exact."""
        lines = [self.name, f"  task  {_short(self.task, self.task)}"]
        for term in self.terms:
            weight = "" if term.weight == 1.0 else f"{_short(term.weight, self.task)} * "
            every = "" if term.every == 1 else f", every {term.every} steps"
            lines.append(f"  term  {weight}{_short(term.loss, self.task)} of {_short(term.head, self.task)}{every}")
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default:
                lines.append(f"  {field.name}  {_short(value, self.task)}")
        return "\n".join(lines)

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
        resting = [context.rests(step) for context in self.contexts]
        return self.spans(num_blocks, step), tuple(step % term.every == 0 for term in self.terms), tuple(resting)

    def require_heads(self, plugin: str) -> None:
        """Raise `MethodError` for a plug-in that has nothing to act on because there are no auxiliary heads."""
        if not self.terms:
            raise MethodError(f"{plugin}({self.name}): {self.name} has no auxiliary heads; use a local base like dgl")

    def require_logits(self, plugin: str) -> Callable[[Any], Tensor]:
        """What reads logits of distributions over classes, (B, C, ...), off an output: the task's ``logits``.

        Raises:
            MethodError: the task has none, or no auxiliary head answers as the model does.
        """
        self.require_heads(plugin)
        if not any(term.scored for term in self.terms):
            raise MethodError(
                f"{plugin}({self.name}): no head of {self.name} answers with what the task scores, such as logits; use "
                "softmax instead of contrastive heads"
            )
        logits: Callable[[Any], Tensor] | None = getattr(self.task, "logits", None)
        if logits is None:
            raise MethodError(
                f"{plugin}({self.name}): it compares distributions over classes, which the answers of a "
                f"{type(self.task).__name__} are not; leave {plugin} out, or give the task a method logits(output)"
            )
        return logits

    def require_local(self, plugin: str) -> Local:
        """The base's spans if they are local; raises `MethodError` if the base decides them otherwise."""
        if not isinstance(self.spans, Local):
            raise MethodError(
                f"{plugin}({self.name}): {self.name} already decides its spans; {plugin} needs a local base like dgl"
            )
        return self.spans


def _short(value: Any, task: Task) -> str:
    """A value as a reader wants it: dataclasses without their defaults, functions by name, the task's own as such."""
    if getattr(value, "__self__", None) is task:
        return f"task.{value.__name__}"
    if isinstance(value, tuple):
        return ", ".join(_short(entry, task) for entry in value)
    if isinstance(value, float):
        return f"{value:g}"
    if not is_dataclass(value) or isinstance(value, type):
        return str(getattr(value, "__name__", value))
    given = []
    for position, field in enumerate(fields(value)):
        own = getattr(value, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if own is task:
            continue
        if field.default is MISSING and field.default_factory is MISSING:
            given.append(_short(own, task) if position < 3 else f"{field.name}={_short(own, task)}")
        elif own != default:
            given.append(f"{field.name}={_short(own, task)}")
    return type(value).__name__ + (f"({', '.join(given)})" if given else "")


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
        if site.features.is_complex():
            raise MethodError(
                f"{method.name}: the features behind block {site.span.stop - 1} are complex numbers, and auxiliary "
                "networks are made of real ones: cut elsewhere, or pass real numbers on (torch.view_as_real)"
            )
        with torch.device("cpu"):  # weights are drawn there, so that a seed means the same on any device
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
