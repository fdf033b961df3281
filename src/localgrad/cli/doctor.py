"""`localgrad doctor`."""

from __future__ import annotations

from localgrad.cli.console import new_console, new_table


def doctor() -> None:
    """Show versions, devices and the data found, and say what is wrong with them."""
    from localgrad.study.doctor import findings

    table = new_table("what", "found", "remark", left=3)
    for row in findings():
        table.add_row(row["what"], row["found"], row["remark"])
    new_console().print(table)
