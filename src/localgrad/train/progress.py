"""What a run shows while it goes on: a live table in a terminal, and everywhere a plain line for each epoch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from localgrad.measure.process_memory import peak_memory
from localgrad.measure.sizes import size
from localgrad.train.experiment import Experiment

REFRESH_SECONDS = 0.5


class Progress:
    """Shows loss, score of every head, the most memory so far, and how long the rest will take.

    Args:
        console: where to; a live table if it is a terminal.
        title: of the run.

    Attributes:
        unread: a word could not be written, as its reader or the terminal is gone.
    """

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.shown, self.began = 0.0, time.monotonic()
        self.steps = 0  # since then
        self.unread = False
        self.live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live is not None:
            with self._written():
                self.live.stop()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.unread = self.console.quiet = True

    def step(self, run: Experiment) -> None:
        """After a step; reads the meters only when the screen is due."""
        self.steps += 1
        if self.live is None or time.monotonic() - self.shown < REFRESH_SECONDS:
            return
        self.shown = time.monotonic()
        now = run.meter.read()
        table = Table(
            title=f"{self.title}: epoch {run.epoch + 1}/{run.config.train.epochs}, "
            f"batch {run.batch}/{len(run.data.train)}",
            caption=", ".join(self._rest(run)),
        )
        for heading in ("head", "training loss", "training accuracy"):
            table.add_column(heading, justify="right" if heading != "head" else "left")
        for name, loss in now["loss"].items():
            score = now["score"].get(name)
            table.add_row(name, f"{loss:.3f}", "-" if score is None else f"{score:.1%}")
        with self._written():
            self.live.update(table, refresh=True)

    def epoch(self, run: Experiment) -> None:
        """After an epoch: one line."""
        row = run.history[-1]
        split = "validation" if "validation" in row else "train"
        scores = row[split]["score"]
        inner = [f"{100 * score:.0f}" for name, score in scores.items() if name != "model"]
        if len(inner) > 4:
            inner = [*inner[:2], "..", *inner[-2:]]
        blocks = f"blocks {' '.join(inner)} model " if inner else ""
        words = [
            f"{self.title} {row['epoch']}/{run.config.train.epochs}",
            f"loss {row['train']['loss']['model']:.3f}",
            f"{split} {blocks}{100 * scores['model']:.1f} %",
            *self._rest(run),
        ]
        with self._written():
            self.console.print("  ".join(words), highlight=False, soft_wrap=True)

    def _rest(self, run: Experiment) -> list[str]:
        """The most memory that was taken so far, and the time left at the pace since the beginning."""
        peak = peak_memory(run.network.device)
        left = run.config.train.epochs * len(run.data.train) - run.step
        words = [] if peak is None else [f"peak {size(peak)}"]
        if left and self.steps:
            seconds = round((time.monotonic() - self.began) / self.steps * left)
            words.append(f"{timedelta(seconds=seconds)} left")
        return words
