"""`localgrad doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from localgrad.cli.console import new_console, new_table


def doctor(
    data: Annotated[str | None, typer.Option(help="Read these data without training, and say how fast.")] = None,
) -> None:
    """Show versions, devices and the data found, and say what is wrong with them."""
    from localgrad.study.doctor import findings, reading

    console = new_console()
    if data is not None:
        title, rows, remarks = reading(data)
        table = new_table(*rows[0], left=0)
        for row in rows:
            table.add_row(*row.values())
        console.print(title, style="bold")
        console.print(table)
        console.print("Seconds of opening and of an epoch, images a second of a later epoch.", *remarks, sep="\n")
        return
    table = new_table("what", "found", "remark", left=3)
    for row in findings():
        table.add_row(row["what"], row["found"], row["remark"])
    console.print(table)
