"""Which rank trains which blocks."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from statistics import median
from typing import Any

from localgrad.engine import local_losses
from localgrad.errors import ConfigError
from localgrad.network import LocalNetwork


def balanced(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of each block such that the most expensive rank costs as little as whole, consecutive blocks allow.

    Args:
        costs: of each block, in any unit: seconds from `seconds_of_blocks`, bytes, parameters.
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
            "the blocks, or cut the network into more (num_blocks=...)"
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


def seconds_of_blocks(network: LocalNetwork, inputs: Any, targets: Any, rounds: int = 3) -> list[float]:
    """Seconds of one training step of each block with its heads, the median of ``rounds``; the network is not changed.

    Blocks that a wider span trains with others share its way back among them evenly.
    """
    twin = copy.deepcopy(network)
    twin.replicas = twin.stage = None
    rows: list[list[float]] = []
    for step in range(rounds + 1):
        seconds = [0.0] * len(network.blocks)
        began = time.perf_counter()
        for span, loss in local_losses(twin, inputs, targets, 1):
            loss.backward()
            now = time.perf_counter()
            for block in range(span.start, span.stop):
                seconds[block] += (now - began) / (span.stop - span.start)
            began = now
        seconds[-1] += time.perf_counter() - began
        twin.zero_grad(set_to_none=True)
        if step:  # the first one warms up
            rows.append(seconds)
    return [median(column) for column in zip(*rows, strict=True)]


def runs_of(network: LocalNetwork, ranks: int, place: Sequence[int] | None) -> list[range]:
    """The blocks of each rank.

    Raises:
        ConfigError: more ranks than blocks, or a placement that is not one rank after the other.
    """
    count = len(network.blocks)
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
    return [range(a, b) for a, b in pairwise(edges)]
