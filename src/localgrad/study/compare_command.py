"""What ``localgrad compare`` does with its options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from localgrad.config import Config
from localgrad.errors import ConfigError
from localgrad.study.compare import (
    check_compared,
    check_same_task,
    in_the_same_time,
    runs_of,
    train_all,
    update_costs,
    variants,
)
from localgrad.study.compare_report import picture, table
from localgrad.study.contest import read_methods
from localgrad.train.folder import write

TABLE, PICTURE = "table.md", "picture.png"


def run(
    base: Config,
    out: Path,
    console: Console,
    *,
    method: Sequence[str],
    num_blocks: Sequence[int],
    seed: Sequence[int],
    parts: int,
    equal_time: Sequence[str],
    rounds: int,
    keep: bool,
    again: str,
) -> str:
    """Measure costs, train what is missing, and write table and picture; returns the table."""
    for name, value in (("rounds", rounds), ("parts", parts)):
        if value < 1:
            raise ConfigError(f"--{name} {value}; it must be at least 1")
    specs = read_methods(method) if method else [base.method, *base.beside]
    ways = variants(base, specs, num_blocks, parts)
    rivals = read_methods(equal_time)
    check_compared(rivals, ways)
    check_same_task(out, base)
    costs = update_costs(base, ways, out, rounds, lambda what: console.print(what, style="dim"))
    longer = in_the_same_time(ways, costs, rivals)
    left = train_all(runs_of(base, [*ways, *longer], seed or [base.train.seed]), out, console, again, keep)
    if left:
        console.print(f"{left} more runs: other processes are at them")
    return report(out)


def report(out: Path) -> str:
    """Write table and picture from the files in ``out``; returns the table."""
    text = table(out)
    write(out / TABLE, text)
    picture(out, out / PICTURE)
    return text
