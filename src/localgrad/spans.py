"""Spans are the gradient flow: which run of blocks each local loss may train, at each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

from localgrad.errors import MethodError, nearest


@dataclass(frozen=True, order=True)
class Span:
    """The run of blocks ``start .. stop - 1`` that one local loss trains.

    Boundary ``b`` lies before block ``b``; the loss reads the features at boundary ``stop`` and its gradient ends at
    boundary ``start``. ``stop == num_blocks`` is the model's own head.
    """

    start: int
    stop: int
    weight: float = 1.0

    def covers(self, block: int) -> bool:
        """Whether the loss of this span trains ``block``."""
        return self.start <= block < self.stop

    def __str__(self) -> str:
        return f"({self.start}, {self.stop})"


class Schedule(Protocol):
    """What a method does at each step, as spans. Must be a pure function of its arguments."""

    def __call__(self, num_blocks: int, step: int) -> tuple[Span, ...]:
        """The spans of one step."""

    def patterns(self, num_blocks: int) -> tuple[tuple[Span, ...], ...]:
        """Every set of spans that some step uses, so that heads can be built before training."""


@dataclass(frozen=True)
class Constant(ABC):
    """A schedule that uses the same spans at every step; subclasses say which."""

    @abstractmethod
    def spans(self, num_blocks: int) -> tuple[Span, ...]:
        """The spans of every step."""

    def __call__(self, num_blocks: int, step: int) -> tuple[Span, ...]:
        return self.spans(num_blocks)

    def patterns(self, num_blocks: int) -> tuple[tuple[Span, ...], ...]:
        return (self.spans(num_blocks),)


@dataclass(frozen=True)
class EndToEnd(Constant):
    """``(0, K)``: ordinary back-propagation."""

    def spans(self, num_blocks: int) -> tuple[Span, ...]:
        return (Span(0, num_blocks),)


@dataclass(frozen=True)
class Local(Constant):
    """``(k, k + 1)`` for every block: no gradient crosses a boundary.

    The last ``tail`` blocks share one span, the model's own.
    """

    tail: int = 1

    def __post_init__(self) -> None:
        if self.tail < 1:
            raise MethodError(f"tail={self.tail}; the model's own loss trains at least the last block")

    def spans(self, num_blocks: int) -> tuple[Span, ...]:
        first = max(0, num_blocks - self.tail)
        return (*(Span(k, k + 1) for k in range(first)), Span(first, num_blocks))


Ends = Literal["both", "cascade", "only"]


@dataclass(frozen=True)
class Overlapping(Constant):
    """``(k, k + 1)`` with weight ``local`` beside ``(k, k + width)`` with weight ``cascade``; a weight of 0 drops them.

    Windows begin at every ``stride``-th block, and one ends the network. With fewer than ``width`` blocks there is one
    window over all of them. The last ``tail`` blocks count as one. Where a window ends, the single block has a loss of
    its own too (``ends="both"``) or not (``cascade``): windows that do not overlap then need one backward pass per
    block. With ``ends="only"`` single blocks have losses of their own only there, as in released code.
    """

    width: int = 2
    local: float = 1.0
    cascade: float = 1.0
    tail: int = 1
    stride: int = 1
    ends: Ends = "both"

    def __post_init__(self) -> None:
        if self.stride < 1 or (self.local == 0 and self.stride > self.width):
            raise MethodError(
                f"stride={self.stride} with width={self.width}, local={self.local}: windows begin at every so many "
                "blocks, at least 1, and without losses on single blocks at most width, or blocks would be left out"
            )
        if self.ends not in get_args(Ends):
            raise MethodError(nearest(self.ends, get_args(Ends), "ends"))
        if self.ends == "only" and not self.cascade > 0:
            raise MethodError("ends='only' with cascade=0: blocks would have losses where windows end, but none would")
        if self.width < 2:
            raise MethodError(f"width={self.width}: a window needs at least 2 blocks; use spans.Local() for one")
        if self.local < 0 or self.cascade < 0 or not self.local + self.cascade > 0:
            raise MethodError(f"local={self.local}, cascade={self.cascade}: need both at least 0, one of them positive")

    def spans(self, num_blocks: int) -> tuple[Span, ...]:
        edges = [*range(max(0, num_blocks - self.tail) + 1), num_blocks]
        if len(edges) == 2:  # neither level differs from end-to-end training
            return (Span(0, num_blocks),)
        windows: dict[tuple[int, int], float] = {}
        if self.cascade > 0:
            width = min(self.width, len(edges) - 1)
            last = len(edges) - 1 - width
            for first in {*range(0, last, self.stride), last}:
                windows[edges[first], edges[first + width]] = self.cascade
        ended = {stop for _, stop in windows}
        if self.local > 0:
            for block in pairwise(edges):
                if self.ends == "both" or (block[1] in ended) == (self.ends == "only"):
                    windows[block] = windows.get(block, 0.0) + self.local
        return tuple(Span(start, stop, weight) for (start, stop), weight in sorted(windows.items()))


@dataclass(frozen=True)
class FromInput(Constant):
    """``(0, k)`` for every boundary, the inner ones with weight ``inner``: losses add up, no gradient is cut."""

    inner: float = 1.0

    def spans(self, num_blocks: int) -> tuple[Span, ...]:
        return (*(Span(0, k, self.inner) for k in range(1, num_blocks)), Span(0, num_blocks))


@dataclass(frozen=True)
class Periodic:
    """``base``, but ``(0, K)`` alone on ``duration`` of every ``every`` steps, from step ``start`` on."""

    base: Schedule
    every: int = 10
    duration: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.duration <= self.every or self.start < 0:
            raise MethodError(
                f"every={self.every}, duration={self.duration}, start={self.start}: need 1 <= duration <= every and "
                "start >= 0"
            )

    def guided(self, step: int) -> bool:
        """Whether the global loss trains the network at ``step``."""
        return step >= self.start and (step - self.start) % self.every < self.duration

    def __call__(self, num_blocks: int, step: int) -> tuple[Span, ...]:
        return (EndToEnd() if self.guided(step) else self.base)(num_blocks, step)

    def patterns(self, num_blocks: int) -> tuple[tuple[Span, ...], ...]:
        """The base's, left out if every step is guided, and that of guided steps."""
        always = self.duration == self.every and self.start == 0
        return (*(() if always else self.base.patterns(num_blocks)), *EndToEnd().patterns(num_blocks))


def check(spans: Sequence[Span], num_blocks: int) -> None:
    """Raise `MethodError` unless ``spans`` are distinct, lie inside the network and train every block."""
    for span in spans:
        if not 0 <= span.start < span.stop <= num_blocks:
            raise MethodError(f"span {span} lies outside a network of {num_blocks} blocks; need 0 <= start < stop <= K")
        if not span.weight > 0:
            raise MethodError(f"span {span} has weight {span.weight}; weights are positive, leave the span out instead")
    if len({(span.start, span.stop) for span in spans}) < len(spans):
        raise MethodError(f"spans {', '.join(map(str, spans))} repeat a (start, stop); add their weights instead")
    idle = [k for k in range(num_blocks) if not any(span.covers(k) for span in spans)]
    if idle:
        raise MethodError(f"no span trains block {idle[0]} (of {num_blocks}); every block needs a loss")


def groups(spans: Sequence[Span], num_blocks: int) -> list[range]:
    """The finest runs of blocks that no span crosses: what may be clipped, stepped or placed on its own."""
    edges = [b for b in range(num_blocks + 1) if not any(span.start < b < span.stop for span in spans)]
    return [range(a, b) for a, b in pairwise(edges)]
