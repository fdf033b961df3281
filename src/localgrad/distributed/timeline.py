"""When each block of a rank ran: by the clock on the wall, or by one that only counts given costs."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from localgrad.measure.plots import BLUE, ORANGE, PURPLE, SKY, drawing


@dataclass(frozen=True)
class Event:
    """One piece of work; times in seconds, ``block`` -1 where there is none."""

    kind: str
    step: int
    part: int
    block: int
    start: float
    end: float


class Timeline:
    """Notes what a rank does, if asked to.

    With `simulate` times come from a clock of its own: work takes the seconds it is said to cost, a message arrives the
    seconds it is said to take after it was sent, and waiting for it moves the clock. What such clocks show does not
    depend on the load of the machine, although every message is really sent.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.recording = False
        self._cost: Callable[[str, int], float] | None = None
        self._delay: Callable[[int], float] = lambda channel: 0.0
        self._clock = 0.0

    def record(self) -> None:
        """Note events from now on."""
        self.recording = True

    def simulate(self, cost: Callable[[str, int], float], delay: Callable[[int], float]) -> None:
        """Note events from now on, on a clock that starts at 0.

        Args:
            cost: seconds of a kind of work (``forward``, ``loss`` with its way back, ``back`` for gradients from
                another rank) on a block.
            delay: seconds a message on a channel is on its way.
        """
        self.recording, self._cost, self._delay, self._clock = True, cost, delay, 0.0

    def now(self) -> float:
        """Seconds; the origin is the machine's, or the begin of the simulation."""
        return time.perf_counter() if self._cost is None else self._clock

    def arrival(self, channel: int) -> float:
        """When a message sent now arrives; 0 on the clock on the wall, where nobody needs to know."""
        return 0.0 if self._cost is None else self._clock + self._delay(channel)

    def received(self, stamp: float) -> None:
        """A message was taken that arrived at ``stamp``."""
        if self._cost is not None:
            self._clock = max(self._clock, stamp)

    @contextlib.contextmanager
    def during(self, kind: str, step: int, part: int, block: int) -> Iterator[None]:
        """Around a piece of work."""
        if not self.recording:
            yield
            return
        start = self.now()
        yield
        if self._cost is not None:
            self._clock += self._cost(kind, block)
        self.events.append(Event(kind, step, part, block, start, self.now()))

    def note(self, kind: str, step: int, part: int, block: int = -1) -> None:
        """A moment: something was sent or received."""
        if self.recording:
            now = self.now()
            self.events.append(Event(kind, step, part, block, now, now))


def chrome_trace(events: dict[int, Iterable[Event]]) -> str:
    """The events of each rank as a file for chrome://tracing or ui.perfetto.dev, JSON."""
    rows = [
        {
            "name": f"{event.kind} {event.block}" if event.block >= 0 else event.kind,
            "cat": event.kind,
            "ph": "X",
            "ts": event.start * 1e6,
            "dur": (event.end - event.start) * 1e6,
            "pid": 0,
            "tid": rank,
            "args": {"step": event.step, "micro-batch": event.part},
        }
        for rank, row in events.items()
        for event in row
    ]
    return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"})


def picture(runs: dict[str, dict[int, Iterable[Event]]], path: Path, begin: float, end: float) -> None:
    """One row of bars for each rank of each named run, between two times in seconds."""
    from matplotlib.patches import Patch

    every = {
        "forward": (SKY, ""), "loss": (ORANGE, "//"), "back": (BLUE, "\\\\"), "backward": (BLUE, "\\\\"),
        "average": (PURPLE, ".."),
    }  # fmt: skip
    kept = {
        (title, rank): [e for e in events if e.end > e.start and e.end > begin and e.start < end]
        for title, ranks in runs.items()
        for rank, events in ranks.items()
    }
    kinds = {event.kind for events in kept.values() for event in events}
    looks = {kind: {"color": color, "hatch": hatch} for kind, (color, hatch) in every.items() if kind in kinds}
    height = 0.9 + 0.45 * (len(kept) + len(runs))
    with drawing(path, 1, height, rows=len(runs)) as (figure, axes):
        for axis, (title, ranks) in zip(axes, runs.items(), strict=True):
            for rank in ranks:
                for event in kept[title, rank]:
                    look = looks[event.kind]
                    axis.barh(rank, event.end - event.start, left=event.start - begin, facecolor=look["color"],
                              hatch=look["hatch"], edgecolor="white")  # fmt: skip
            axis.set(title=title, yticks=list(ranks), yticklabels=[f"rank {r}" for r in ranks], xlim=(0, end - begin))
            axis.grid(False)
            axis.invert_yaxis()
            axis.label_outer()
        axes[-1].set_xlabel("seconds")
        handles = [Patch(facecolor=look["color"], hatch=look["hatch"], edgecolor="white", label=kind)
                   for kind, look in looks.items()]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
