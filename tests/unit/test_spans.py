"""Schedules, the check of spans, and the groups they form."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from localgrad.errors import MethodError
from localgrad.spans import EndToEnd, FromInput, Local, Overlapping, Span, check, groups


def triples(spans: tuple[Span, ...]) -> list[tuple[int, int, float]]:
    return [(span.start, span.stop, span.weight) for span in spans]


def test_simple_schedules() -> None:
    assert triples(EndToEnd()(4, 0)) == [(0, 4, 1.0)]
    assert triples(Local()(3, 9)) == [(0, 1, 1.0), (1, 2, 1.0), (2, 3, 1.0)]
    assert triples(FromInput(0.3)(3, 0)) == [(0, 1, 0.3), (0, 2, 0.3), (0, 3, 1.0)]
    assert FromInput(0.3)(1, 0) == EndToEnd()(1, 0) == Local()(1, 0) == (Span(0, 1),)


def test_overlapping_windows() -> None:
    assert triples(Overlapping(2, 0.25, 0.75)(3, 0)) == [
        (0, 1, 0.25),
        (0, 2, 0.75),
        (1, 2, 0.25),
        (1, 3, 0.75),
        (2, 3, 0.25),
    ]
    assert triples(Overlapping(3, 0.0, 0.5)(4, 0)) == [(0, 3, 0.5), (1, 4, 0.5)]
    assert triples(Overlapping(5, 1.0, 2.0)(2, 0)) == [(0, 1, 1.0), (0, 2, 2.0), (1, 2, 1.0)]
    assert triples(Overlapping(2, 1.0, 2.0)(1, 0)) == [(0, 1, 1.0)]  # one block alone is trained end to end
    assert triples(Overlapping(2, 0.25, 0.75, tail=2)(3, 0)) == [(0, 1, 0.25), (0, 3, 0.75), (1, 3, 0.25)]


def test_windows_may_lie_side_by_side() -> None:
    assert triples(Overlapping(2, 1.0, 0.5, stride=2)(4, 0)) == [
        (0, 1, 1.0),
        (0, 2, 0.5),
        (1, 2, 1.0),
        (2, 3, 1.0),
        (2, 4, 0.5),
        (3, 4, 1.0),
    ]
    assert triples(Overlapping(2, 0.0, 1.0, stride=2)(5, 0)) == [(0, 2, 1.0), (2, 4, 1.0), (3, 5, 1.0)]
    assert triples(Overlapping(2, 1.0, 1.0, stride=9)(4, 0))[-2:] == [(2, 4, 1.0), (3, 4, 1.0)]
    alone = Overlapping(2, 1.0, 0.5, stride=2, ends="cascade")(5, 0)
    assert triples(alone) == [(0, 1, 1.0), (0, 2, 0.5), (2, 3, 1.0), (2, 4, 0.5), (3, 5, 0.5)]
    assert triples(Overlapping(2, 1.0, 0.0, ends="cascade")(2, 0)) == [(0, 1, 1.0), (1, 2, 1.0)]
    only = Overlapping(2, 0.001, 0.999, ends="only")(4, 0)
    assert triples(only)[:4] == [(0, 2, 0.999), (1, 2, 0.001), (1, 3, 0.999), (2, 3, 0.001)]
    assert triples(only)[4:] == [(2, 4, 0.999), (3, 4, 0.001)]
    assert triples(Overlapping(3, 0.5, 1.0, ends="only")(4, 0))[:2] == [(0, 3, 1.0), (1, 4, 1.0)]


@pytest.mark.parametrize(
    "settings",
    [(1, 1.0, 1.0), (2, -0.1, 1.0), (2, 0.0, 0.0), (2, 1.0, 1.0, 1, 0), (2, 0.0, 1.0, 1, 3), (2, 1.0, 1.0, 1, 1, "x")],
)
def test_overlapping_refuses(settings: tuple[Any, ...]) -> None:
    with pytest.raises(MethodError):
        Overlapping(*settings)


@pytest.mark.parametrize("schedule", [EndToEnd(), Local(), FromInput(0.3), Overlapping(), Overlapping(3, 0.0, 2.0)])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7])
def test_every_schedule_is_valid_and_says_its_patterns(schedule: Local, num_blocks: int) -> None:
    spans = schedule(num_blocks, 0)
    check(spans, num_blocks)
    assert all(schedule(num_blocks, step) == spans for step in (1, 17, 10**6))
    assert schedule.patterns(num_blocks) == (spans,)
    assert any(span.stop == num_blocks for span in spans)


@pytest.mark.parametrize(
    "spans, message",
    [
        ([Span(0, 3)], "outside a network of 2 blocks"),
        ([Span(-1, 2)], "outside"),
        ([Span(1, 1), Span(0, 2)], "outside"),
        ([Span(0, 2, 0.0)], "weight 0.0"),
        ([Span(0, 2, -1.0)], "weight -1.0"),
        ([Span(0, 2, float("nan"))], "weight nan"),
        ([Span(0, 2), Span(0, 2, 0.5)], "repeat"),
        ([Span(1, 2)], "no span trains block 0"),
        ([Span(0, 1)], "no span trains block 1"),
    ],
)
def test_check_refuses(spans: list[Span], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        check(spans, 2)


def test_a_span_covers_its_blocks() -> None:
    assert [Span(1, 3).covers(k) for k in range(4)] == [False, True, True, False]
    assert str(Span(1, 3, 0.5)) == "(1, 3)"


@pytest.mark.parametrize(
    "spans, expected",
    [
        (Local()(3, 0), [range(1), range(1, 2), range(2, 3)]),
        (EndToEnd()(3, 0), [range(3)]),
        (Overlapping(2)(3, 0), [range(3)]),
        ((Span(0, 2), Span(2, 3), Span(3, 5), Span(4, 5)), [range(2), range(2, 3), range(3, 5)]),
    ],
)
def test_groups(spans: tuple[Span, ...], expected: list[range]) -> None:
    num_blocks = expected[-1].stop
    found = groups(spans, num_blocks)
    assert found == expected
    assert found[0].start == 0 and all(a.stop == b.start for a, b in pairwise(found))
    for span in spans:
        assert any(span.start in group and span.stop - 1 in group for group in found)
