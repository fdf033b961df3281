"""The one clock: what is timed takes turns, so that a machine that slows down slows all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


def wait(device: torch.device) -> None:
    """Until everything that was started on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds on the wall clock, once the device is done."""
    wait(device)
    return time.perf_counter()


def clock_of(device: torch.device) -> tuple[Callable[[], float], str]:
    """Time of the processor where one thread does everything, which other processes do not disturb; else the wall's."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time, "CPU time of one thread"
    return time.perf_counter, "wall clock"


def in_turns(
    works: Sequence[Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warm: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] = lambda _: None,
) -> list[list[float]]:
    """Seconds of every call of each work, in ``rounds`` after ``warm`` ones that do not count.

    Each round begins with another work, so that none is always the one after the others.
    """
    taken: list[list[float]] = [[] for _ in works]
    for turn in range(warm + rounds):
        if turn >= warm:
            progress(f"time, round {turn - warm + 1} of {rounds}")
        for offset in range(len(works)):
            index = (turn + offset) % len(works)
            wait(device)
            started = clock()
            works[index]()
            wait(device)
            if turn >= warm:
                taken[index].append(clock() - started)
    return taken
