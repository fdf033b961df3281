"""Which rank trains which blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from statistics import median
from typing import Any

from localgrad.batches import parts_of
from localgrad.engine import execute, in_context
from localgrad.errors import ConfigError
from localgrad.measure.timing import now
from localgrad.network import LocalNetwork
from localgrad.passes import Pass
from localgrad.task import Batch
from localgrad.timetable import Do, Row, timetable


def balanced(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of each block such that the most expensive rank costs as little as whole, consecutive blocks allow.

    Args:
        costs: of each block, in any unit: seconds from `localgrad.distributed.simulate.measured`, bytes, parameters.
        ranks: each gets at least one block.

    Raises:
        ConfigError: more ranks than blocks.

    Example:
        >>> from localgrad.distributed.placement import balanced
        >>> balanced([3.0, 1.0, 1.0, 1.0], 2)
        [0, 1, 1, 1]
    """
    count = len(costs)
    if not 1 <= ranks <= count:
        raise ConfigError(
            f"{ranks} ranks for {count} blocks; each rank needs at least one. Start {count} processes or fewer along "
            "the blocks, or cut the network into more"
        )

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        """The cost of the most expensive of ``left`` ranks for the blocks from ``first`` on, and where they begin."""
        if left == 1:
            return sum(costs[first:]), (first,)
        ways = []
        for stop in range(first + 1, count - left + 2):
            rest, edges = best(stop, left - 1)
            ways.append((max(sum(costs[first:stop]), rest), (first, *edges)))
        return min(ways)

    edges = [*best(0, ranks)[1], count]
    return [rank for rank, (a, b) in enumerate(pairwise(edges)) for _ in range(a, b)]


def clocked(
    network: LocalNetwork,
    inputs: Any,
    targets: Any,
    rounds: int = 3,
    ran: Callable[[Pass, int], None] = lambda one, block: None,
) -> dict[tuple[Do, int], float]:
    """Seconds of the rows of one training step, by what is done and the block; medians of ``rounds``.

    Micro-batches add up. The network is not changed.

    Args:
        network: trained by local losses here, whatever it is part of.
        inputs, targets: a batch.
        rounds: steps, after one that warms up.
        ran: called with a micro-batch and a block that has just run forward.
    """
    copied = copy.deepcopy(network)
    copied.replicas = copied.stage = None
    spans = copied.spans(1)
    found: dict[tuple[Do, int], list[float]] = {}
    for _ in range(rounds + 1):
        seconds: dict[tuple[Do, int], float] = {}
        parts = parts_of(inputs, targets, copied.method.accumulate.parts, copied.partition.example)
        with copied.opened(spans) as opened:
            passes = []
            for part, (x, y, share) in enumerate(parts):
                batch = in_context(copied, Batch(x, y, 1), part, None)
                passes.append(Pass(copied, opened, spans, batch, part, share))
            late = any(rule.late for rule in copied.rules)
            table = timetable(spans, copied.num_blocks, len(passes), late=late)
            for _, loss in execute(copied, _timed(table, passes, seconds, ran), passes, None, lambda block: None):
                loss.backward()
        copied.zero_grad(set_to_none=True)
        for row, taken in seconds.items():
            found.setdefault(row, []).append(taken)
    return {row: median(column[1:]) for row, column in found.items()}


def _timed(
    table: Sequence[Row],
    passes: Sequence[Pass],
    seconds: dict[tuple[Do, int], float],
    ran: Callable[[Pass, int], None],
) -> Iterator[Row]:
    """The rows; what passes until the next one is asked for is added to ``seconds``."""
    device = passes[0].network.device
    for row in table:
        began = now(device)
        yield row
        taken = now(device) - began
        seconds[row.do, row.block] = seconds.get((row.do, row.block), 0.0) + taken
        if row.do == "forward":
            ran(passes[row.part], row.block)


def runs_of(network: LocalNetwork, ranks: int, place: Sequence[int] | None) -> tuple[range, ...]:
    """The blocks of each rank.

    Raises:
        ConfigError: more ranks than blocks, or a placement that is not one rank after the other.
    """
    count = network.num_blocks
    if place is None:
        place = balanced([sum(p.numel() for p in network.block_parameters(k)) for k in range(count)], ranks)
    place = list(place)
    if ranks > count:
        balanced([1.0] * count, ranks)
    if len(place) != count or sorted(set(place)) != list(range(ranks)) or place != sorted(place):
        even = [block * ranks // count for block in range(count)]
        raise ConfigError(
            f"place={place} for {count} blocks on {ranks} ranks; it names the rank of each block, in order and leaving "
            f"none out, for instance place={even}"
        )
    edges = [*(place.index(rank) for rank in range(ranks)), count]
    return tuple(range(a, b) for a, b in pairwise(edges))
