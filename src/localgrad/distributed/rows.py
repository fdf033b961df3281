"""The rows of one rank: those of the timetable that lie on its blocks, and what it takes, sends, returns and collects.

``drawn(rank_table(spans, runs, rank))`` prints them. Four blocks on two ranks, one micro-batch:

    dgl      rank 0   forward 0 | loss (0, 1) | back 0, free | done 0 | forward 1 | send 1 | loss (1, 2) | back 1, free
                      | done 1
             rank 1   take 2 | forward 2 | loss (2, 3) | back 2, free | done 2 | forward 3 | loss (3, 4) | back 3, free
                      | done 3
    e2e      rank 0   forward 0 | forward 1 | send 1 | collect 1 | back 1, free | back 0, free | done 1 | done 0
             rank 1   take 2 | forward 2 | forward 3 | loss (0, 4) | back 3, free | back 2, free | return 2 | done 3
                      | done 2

A part is taken before its first block here, and sent as soon as its last block has run, before the loss there. Where a
span crosses, its gradient is returned when the way back has reached the first block here. A rank collects after all its
parts have run forward, in the order in which the next rank returns: so neither waits for the other in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from localgrad.spans import Span
from localgrad.timetable import Row, timetable

Runs = tuple[range, ...]


@lru_cache(maxsize=1024)
def rank_table(
    spans: tuple[Span, ...], runs: Runs, rank: int, parts: int = 1, *, late: bool = False, training: bool = True
) -> tuple[Row, ...]:
    """The rows of one step on one rank.

    Args:
        spans: of the step.
        runs: the blocks of each rank.
        rank: which.
        parts, late, training: as for `localgrad.timetable.timetable`.
    """
    blocks = runs[rank]
    first, last = blocks[0], blocks[-1]
    ends = {s.start: max(t.stop for t in spans if t.start == s.start) for s in spans}
    entered = [start for start, stop in ends.items() if start < blocks.stop < stop]  # ways that come from the next rank
    left = {k: parts * sum(start <= k for start in entered) for k in blocks}
    rows: list[Row] = []
    for row in timetable(spans, runs[-1].stop, parts, late=late, training=training):
        comes = row.do == "back" and row.start in entered
        if row.block not in blocks or comes or (row.do == "done" and left[row.block]):
            continue
        if row.do == "forward" and row.block == first and rank > 0:
            rows.append(Row("take", first, row.part))
        rows.append(row)
        if row.do == "forward" and row.block == last and rank < len(runs) - 1:
            rows.append(Row("send", last, row.part))
        if row.do == "back" and row.block == first > row.start:
            rows.append(Row("return", first, row.part, start=row.start))
    there = rank_table(spans, runs, rank + 1, parts, late=late, training=training) if training and entered else ()
    for part, start in ((row.part, row.start) for row in there if row.do == "return"):
        way = range(last, max(start, first) - 1, -1)
        rows.append(Row("collect", last, part, start=start))
        rows += [Row("back", block, part, start=start) for block in way]
        if start < first:
            rows.append(Row("return", first, part, start=start))
        left |= {block: left[block] - 1 for block in way}
        rows += [Row("done", block, part) for block in way if left[block] == 0]
    return tuple(_freed(rows))


def _freed(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows, with each graph freed by the last way back through it in this order."""
    last = {(row.block, row.part): place for place, row in enumerate(rows) if row.do == "back"}
    for place, row in enumerate(rows):
        yield row._replace(free=place == last.get((row.block, row.part)))


def acts(rows: Iterable[Row]) -> Iterator[tuple[Row, tuple[Row, ...]]]:
    """Each row with the rows ``back`` that follow it: what is timed, and priced, as one piece of work."""
    act: Row | None = None
    ways: list[Row] = []
    for row in rows:
        if row.do == "back":
            ways.append(row)
            continue
        if act is not None:
            yield act, tuple(ways)
        act, ways = row, []
    if act is not None:
        yield act, tuple(ways)


def ways_through(rows: Iterable[Row], block: int) -> list[tuple[int, int]]:
    """The ways back through a block, in order: micro-batch, and where its spans start."""
    return [(row.part, row.start) for row in rows if row.do == "back" and row.block == block]
