"""The order of a step, as data."""

from __future__ import annotations

import inspect
import re

import pytest

import localgrad
from localgrad import methods, timetable
from localgrad.spans import Span
from localgrad.timetable import Row, drawn

TASK = localgrad.tasks.classification(3)
DGL = methods.dgl(TASK)
DRAWN = {
    "e2e": (methods.e2e(TASK), 4),
    "dgl": (DGL, 4),
    "mlaan(dgl)": (methods.mlaan(DGL), 4),
    "accumulation(dgl, parts=2)": (methods.accumulation(DGL, parts=2), 2),
}


def rows(method: localgrad.Method, num_blocks: int, step: int = 1, *, late: bool = False) -> tuple[Row, ...]:
    return timetable.timetable(method.spans(num_blocks, step), num_blocks, method.micro_batches, late=late)


@pytest.mark.parametrize("name", DRAWN)
def test_the_docstring_shows_what_the_function_prints(name: str) -> None:
    method, num_blocks = DRAWN[name]
    text = re.sub(r"\s+", " ", inspect.getdoc(timetable) or "")
    assert f"``{name}``" in text and re.sub(r"\s+", " ", drawn(rows(method, num_blocks))) in text


def test_guided_steps_of_pgl_have_the_rows_of_end_to_end_training() -> None:
    method = methods.pgl(DGL, every=2)
    assert rows(method, 4, 0) == rows(methods.e2e(TASK), 4)
    assert rows(method, 4, 1) == rows(DGL, 4)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    "method",
    [methods.e2e(TASK), DGL, methods.mlaan(DGL), methods.windows(DGL, width=3), methods.deep_supervision(TASK),
     methods.auglocal(TASK)],
    ids=lambda m: m.name,
)  # fmt: skip
def test_what_every_timetable_promises(method: localgrad.Method, parts: int) -> None:
    num_blocks = 5
    spans = method.spans(num_blocks, 1)
    table = timetable.timetable(spans, num_blocks, parts)
    at = {row: index for index, row in enumerate(table)}
    assert len(at) == len(table)
    for part in range(parts):
        own = [row for row in table if row.part == part]
        assert [row.block for row in own if row.do == "forward"] == list(range(num_blocks))
        assert {row.span for row in own if row.do == "loss"} == set(spans)
        for block in range(num_blocks):
            backs = [row for row in own if row.do == "back" and row.block == block]
            assert len(backs) == len({s.start for s in spans if s.covers(block)})
            assert [row.free for row in backs] == [False] * (len(backs) - 1) + [True]
            (forward,) = (row for row in own if row.do == "forward" and row.block == block)
            assert all(at[forward] < at[row] for row in backs)
    for block in range(num_blocks):
        (done,) = (row for row in table if row.do == "done" and row.block == block)
        assert all(at[row] < at[done] for row in table if row.do == "back" and row.block == block)


def test_parts_pass_a_group_of_blocks_before_the_next_one_begins() -> None:
    table = timetable.timetable(methods.auglocal(TASK, tail=2).spans(4, 0), 4, 2)  # (0, 1), (1, 2), (2, 4)
    forwards = [(row.block, row.part) for row in table if row.do == "forward"]
    assert forwards == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]


def test_one_span_over_everything_leaves_the_parts_one_after_the_other() -> None:
    forwards = [(row.block, row.part) for row in timetable.timetable((Span(0, 3),), 3, 2) if row.do == "forward"]
    assert forwards == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


def test_heads_that_learn_from_the_next_loss_keep_their_block_waiting() -> None:
    late = [str(row) for row in rows(DGL, 3, late=True) if row.do in ("loss", "done")]
    assert late == ["loss (0, 1)", "loss (1, 2)", "done 0", "loss (2, 3)", "done 1", "done 2"]


def test_evaluation_runs_forwards_and_losses_only() -> None:
    assert {row.do for row in timetable.timetable(DGL.spans(3, 0), 3, training=False)} == {"forward", "loss"}
