"""``bench/ladder.py``: each row has one switch more than the row above, and exact rows that dominate are bold."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from bench.ladder import ladder, table
from hypothesis import given, settings
from hypothesis import strategies as st

from localgrad import methods, tasks
from localgrad.study.contest_report import Contest, Row
from localgrad.study.ways import Way

TASK = tasks.classification(10)
SAME = Row("", "", "", "fp32", "SGD", "", 1, (), 0, 0, None, None, None, None, 0, seconds=1.0, rounds=(1.0,))


def switches(way: Way) -> set[str]:
    """What is on."""
    recompute, parts = way.method.recompute.blocks, way.method.micro_batches
    on = {"per block": way.per_block, "inside": way.inside, "recompute": recompute, "parts": parts > 1}
    on["every unit"] = way.num_blocks is None
    return {name for name, is_on in on.items() if is_on} | set(way.variant.split("+")) - {"fp32"}


def test_each_row_has_one_switch_more() -> None:
    ways = ladder(methods.dgl(TASK, head="linear"), "dgl", 4, 4, compiled=True)
    exact = [way for way in ways if way.kind != "local"][:-1]
    ours = [way for way in ways if way.kind == "local"]
    assert len(exact) == len(ours) == 7
    for rows in (exact, ours):
        assert switches(rows[0]) == set()
        for below, above in pairwise(rows):
            assert switches(below) < switches(above) and len(switches(above) - switches(below)) == 1, above.name
    assert [switches(way) for way in exact[:4]] == [switches(way) for way in ours[:4]]
    (alone,) = (way for way in ways if way.name == "accumulation x4 alone")
    assert switches(alone) == {"bf16", "channels_last", "compile", "parts"}
    assert not any(way.has("compile") for way in ladder(methods.dgl(TASK), "dgl", 4, 4, compiled=False))


ROWS = st.lists(
    st.tuples(st.booleans(), st.none() | st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    min_size=1,
    max_size=6,
)


@given(ROWS)
@settings(deadline=None, max_examples=50)
def test_what_dominates_ours_is_bold(drawn: list[Any]) -> None:
    rows = [
        replace(
            SAME,
            name=f"row {k}",
            kind="local" if local else "end-to-end",
            total_bytes=total,
            peak_bytes=peak,
            time_ratio=float(seconds),
        )
        for k, (local, total, peak, seconds) in enumerate(drawn)
    ]
    text = table(Contest("m", 1, 8, (3, 8, 8), 10, "cpu", 1, "clock", "2", tuple(rows)))
    for row in rows:
        others = [o for o in rows if (o.kind == "local") != (row.kind == "local")]
        line = next(line for line in text.splitlines() if f"{row.name} " in line or f"{row.name}**" in line)
        if row.kind == "local":
            assert any(f"below {o.name} " in line for o in others) == any(o.dominates(row) for o in others)
        else:
            assert (f"**{row.name}**" in line) == any(row.dominates(o) for o in others)


def test_compiled_rows_are_compared_by_the_peak_from_outside() -> None:
    known = replace(SAME, total_bytes=10, peak_bytes=30, time_ratio=1.0)
    compiled = replace(SAME, total_bytes=None, peak_bytes=20, time_ratio=1.0)
    assert compiled.dominates(known) and not known.dominates(compiled) and not known.dominates(known)
    assert known.dominates(replace(known, total_bytes=11, peak_bytes=1))
    assert known.dominates(replace(known, total_bytes=9, state_bytes=2)) and known.dominates(
        replace(known, total_bytes=9, weight_bytes=2)
    )
