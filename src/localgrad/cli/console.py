"""How commands print."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command what follows when nobody reads its words any more."""
        raise BrokenPipeError


def new_console(stderr: bool = False) -> Console:
    """Prints words as they are: `localgrad[timm]` is no markup."""
    return _Console(stderr=stderr, markup=False, highlight=False)


def new_table(*headings: str, left: int = 1) -> Table:
    """A table that fits 80 columns as long as its words do; ``left`` columns are text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", overflow="fold", no_wrap=index == 0)
    return table
