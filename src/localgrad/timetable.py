"""The order of one step, as data: what the engine does with blocks, losses and graphs, and when.

``drawn(timetable(spans, num_blocks))`` prints the rows. Four blocks, one micro-batch:

``e2e``::

    forward 0 | forward 1 | forward 2 | forward 3 | loss (0, 4) | back 3, free | back 2, free | back 1, free |
    back 0, free | done 3 | done 2 | done 1 | done 0

``dgl``::

    forward 0 | loss (0, 1) | back 0, free | done 0 | forward 1 | loss (1, 2) | back 1, free | done 1 |
    forward 2 | loss (2, 3) | back 2, free | done 2 | forward 3 | loss (3, 4) | back 3, free | done 3

``mlaan(dgl)``::

    forward 0 | loss (0, 1) | forward 1 | loss (1, 2) | loss (0, 2) | back 1 | back 0, free | done 0 |
    forward 2 | loss (2, 3) | loss (1, 3) | back 2 | back 1, free | done 1 | forward 3 | loss (3, 4) | back 3 |
    loss (2, 4) | back 3, free | back 2, free | done 3 | done 2

``pgl(dgl)`` has the rows of ``e2e`` on guided steps and those of ``dgl`` on the others.

Spans that start at one boundary share one way back, taken when the widest of them ends. A graph is freed by the last
way back through it, a block is done when no span will reach it any more.

Several micro-batches pass a *group* of blocks, the finest run that no span crosses, before the next group begins. So a
block steps, and frees its gradients, before the next one runs, and one part's graphs are alive at a time.

``accumulation(dgl, parts=2)`` in two blocks::

    forward 0 | loss (0, 1) | back 0, free | forward 0' | loss (0, 1)' | back 0', free | done 0 |
    forward 1 | loss (1, 2) | back 1, free | forward 1' | loss (1, 2)' | back 1', free | done 1

Where one span covers everything the one group is the network, and the parts run one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from localgrad.spans import Span, groups

Do = Literal["forward", "loss", "back", "twins", "done", "take", "send", "return", "collect"]


class Row(NamedTuple):
    """One thing that is done.

    Args:
        do: ``forward`` runs a block; ``loss`` yields that of a span; ``back`` goes back through a block on the way of
            the spans from ``start``; ``twins`` at the boundary behind a block move; ``done``: a block's gradients are
            complete. Between ranks: ``take`` and ``send`` features, ``return`` and ``collect`` gradients, see
            `localgrad.distributed.rows`.
        block: which.
        part: micro-batch.
        span: of a ``loss``.
        start: of a way ``back``, or of the way whose gradients are returned or collected.
        free: whether the block's graph is freed.
    """

    do: Do
    block: int
    part: int = 0
    span: Span | None = None
    start: int = -1
    free: bool = False

    def __str__(self) -> str:
        what = str(self.span) if self.span is not None else str(self.block)
        primes = "" if self.do == "done" else "'" * self.part
        return f"{self.do} {what}{primes}{', free' * self.free}"


class _Part:
    """Which ways back one micro-batch still has to take."""

    def __init__(self, spans: Sequence[Span], num_blocks: int) -> None:
        self.ends = {s.start: max(t.stop for t in spans if t.start == s.start) for s in spans}
        self.left = [sum(start <= k < stop for start, stop in self.ends.items()) for k in range(num_blocks)]

    def back(self, span: Span, part: int) -> Iterator[Row]:
        """The rows behind the loss of ``span``: the way back, if it is the widest of those that start there."""
        if span.stop == self.ends[span.start]:
            for block in range(span.stop - 1, span.start - 1, -1):
                self.left[block] -= 1
                yield Row("back", block, part, start=span.start, free=self.left[block] == 0)


def timetable(
    spans: Sequence[Span], num_blocks: int, parts: int = 1, *, late: bool = False, training: bool = True
) -> tuple[Row, ...]:
    """The rows of a step.

    Args:
        spans: of the step.
        num_blocks: K.
        parts: micro-batches.
        late: whether heads get gradients from the losses at the next boundary, so that a block is done only after them.
        training: False for forwards and losses only.
    """
    rows: list[Row] = []
    states = [_Part(spans, num_blocks) for _ in range(parts)]
    ordered = sorted(spans, key=lambda span: (span.stop, -span.start))
    freed: list[int] = []  # blocks that no span of the last part will reach any more, in this order
    for group in groups(spans, num_blocks):
        for part, state in enumerate(states):
            for block in group:
                rows.append(Row("forward", block, part))
                for span in (s for s in ordered if s.stop == block + 1):
                    rows.append(Row("loss", block, part, span))
                    back = list(state.back(span, part)) if training else []
                    rows += back
                    freed += [row.block for row in back if row.free and part == parts - 1]
                if training and part == parts - 1:
                    rows.append(Row("twins", block, part))
                    last = block + 1 == num_blocks
                    done = [k for k in freed if last or not late or k < block]
                    rows += [Row("done", k, part) for k in done]
                    freed = [k for k in freed if k not in done]
    return tuple(rows)


def drawn(rows: Sequence[Row]) -> str:
    """The rows in one line; micro-batches after the first have primes, rows that move twins are left out."""
    return " | ".join(str(row) for row in rows if row.do != "twins")
