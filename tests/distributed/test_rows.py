"""The rows of ranks: together those of one process, each message sent and taken once, and nobody waits in a circle."""

from __future__ import annotations

from collections import Counter

import pytest

from localgrad import methods
from localgrad.distributed.rows import acts, rank_table, ways_through
from localgrad.spans import EndToEnd, Local, Overlapping
from localgrad.timetable import drawn, timetable
from zoo import METHODS

DGL = METHODS["dgl"]
HALVES = (range(2), range(2, 4))


def test_the_drawn_tables() -> None:
    dgl, e2e, windows = (schedule(4, 0) for schedule in (Local(), EndToEnd(), Overlapping()))
    assert [drawn(rank_table(dgl, HALVES, rank)) for rank in (0, 1)] == [
        "forward 0 | loss (0, 1) | back 0, free | done 0 | forward 1 | send 1 | loss (1, 2) | back 1, free | done 1",
        "take 2 | forward 2 | loss (2, 3) | back 2, free | done 2 | forward 3 | loss (3, 4) | back 3, free | done 3",
    ]
    assert [drawn(rank_table(e2e, HALVES, rank)) for rank in (0, 1)] == [
        "forward 0 | forward 1 | send 1 | collect 1 | back 1, free | back 0, free | done 1 | done 0",
        "take 2 | forward 2 | forward 3 | loss (0, 4) | back 3, free | back 2, free | return 2 | done 3 | done 2",
    ]
    assert drawn(rank_table(windows, HALVES, 0, 2)) == (
        "forward 0 | loss (0, 1) | forward 1 | send 1 | loss (1, 2) | loss (0, 2) | back 1 | back 0, free"
        " | forward 0' | loss (0, 1)' | forward 1' | send 1' | loss (1, 2)' | loss (0, 2)' | back 1' | back 0', free"
        " | done 0 | collect 1 | back 1, free | collect 1' | back 1', free | done 1"
    )
    assert drawn(rank_table(windows, HALVES, 0, training=False)) == (
        "forward 0 | loss (0, 1) | forward 1 | send 1 | loss (1, 2) | loss (0, 2)"
    )


def test_what_is_done_is_timed_with_the_way_back_behind_it() -> None:
    rows = [row for row in rank_table(EndToEnd()(4, 0), HALVES, 0) if row.do != "twins"]
    assert [(act.do, [way.block for way in ways]) for act, ways in acts(rows)] == [
        ("forward", []), ("forward", []), ("send", []), ("collect", [1, 0]), ("done", []), ("done", []),
    ]  # fmt: skip
    assert [row for act, ways in acts(rows) for row in (act, *ways)] == rows


LAYOUTS = [
    (range(6),),
    (range(3), range(3, 6)),
    (range(1), range(1, 5), range(5, 6)),
    (range(2), range(2, 3), range(3, 6)),
    tuple(range(k, k + 1) for k in range(6)),
]
SPANS = {
    "dgl": DGL,
    "tail": methods.tail(DGL, blocks=3),
    "windows": methods.windows(DGL),
    "windows of 4": methods.windows(DGL, width=4),
    "windows side by side": methods.windows(DGL, width=2, stride=2),
    "mlaan": METHODS["mlaan(dgl)"],
    "deep supervision": METHODS["deep_supervision"],
    "e2e": METHODS["e2e"],
}


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("runs", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", SPANS)
def test_ranks_do_what_one_process_does(name: str, runs: tuple[range, ...], parts: int) -> None:
    spans = SPANS[name].spans(6, 0)
    whole = timetable(spans, 6, parts)
    tables = [rank_table(spans, runs, rank, parts) for rank in range(len(runs))]
    together = [row for table in tables for row in table]
    for do in ("forward", "loss", "twins", "done"):
        assert Counter(r for r in together if r.do == do) == Counter(r for r in whole if r.do == do)
    for block in range(6):
        assert sorted(ways_through(together, block)) == sorted(ways_through(whole, block))
        freed = [(row.part, row.free) for row in together if row.do == "back" and row.block == block and row.free]
        assert sorted(freed) == [(part, True) for part in range(parts)]  # once, by the last way
    for run, table, following in zip(runs, tables, tables[1:], strict=False):
        sent, taken = ([r.part for r in rows if r.do == do] for rows, do in ((table, "send"), (following, "take")))
        assert sent == taken == list(range(parts))
        back, collected = (
            [(r.part, r.start) for r in rows if r.do == do] for rows, do in ((following, "return"), (table, "collect"))
        )
        crossing = {span.start for span in spans if span.start < run.stop < span.stop}
        assert back == collected and sorted(back) == sorted((m, s) for m in range(parts) for s in crossing)


@pytest.mark.parametrize("runs", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", SPANS)
def test_with_links_of_one_message_every_rank_comes_to_its_end(name: str, runs: tuple[range, ...]) -> None:
    """Features wait for room on the link, which holds one message; gradients do not."""
    spans = SPANS[name].spans(6, 0)
    steps = 3
    tables = [[row for _ in range(steps) for row in rank_table(spans, runs, rank, 4)] for rank in range(len(runs))]
    place = [0] * len(runs)
    features, gradients = [0] * (len(runs) + 1), [0] * (len(runs) + 1)  # on the link before a rank, behind a rank
    moved = True
    while moved:
        moved = False
        for rank, table in enumerate(tables):
            if place[rank] == len(table):
                continue
            row = table[place[rank]]
            if (row.do == "take" and not features[rank]) or (row.do == "collect" and not gradients[rank]):
                continue
            if row.do == "send" and features[rank + 1]:
                continue
            features[rank] -= row.do == "take"
            features[rank + 1] += row.do == "send"
            gradients[rank] -= row.do == "collect"
            gradients[rank - 1] += row.do == "return"
            place[rank] += 1
            moved = True
    assert place == [len(table) for table in tables]
