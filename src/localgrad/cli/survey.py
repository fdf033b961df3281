"""`localgrad survey`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localgrad.cli.console import new_console


def survey(
    library: Annotated[
        str,
        typer.Argument(help="timm, torchvision, or module:name of yours; see localgrad.study.examination.Candidate."),
    ],
    pattern: Annotated[str, typer.Option("--filter", help="Shell pattern of names, for instance 'vit_*'.")] = "*",
    out: Annotated[
        Path | None, typer.Option(help="Rows are appended here; default survey-LIBRARY.jsonl.", show_default=False)
    ] = None,
) -> None:
    """Check every model of a library: cut, compared with the model itself, and trained.

    [bold]localgrad survey torchvision --filter 'resnet*'[/bold]

    Two models at a time, in a process and thread each. Those whose rows in the file say that all went well are not run
    again.
    """
    from localgrad.study import survey

    console, progress = new_console(), new_console(stderr=True)
    out = out or Path(f"survey-{library.replace(':', '-')}.jsonl")
    selection = survey.select(library, pattern, cache=out.with_suffix(".families.json"))
    rows = []
    for row, new in survey.survey(library, selection, out):
        rows.append(row)
        if new:
            state = "ok" if row["ok"] else "FAILED: " + ", ".join(row["reasons"])
            progress.print(f"{len(rows)} of {len(selection)}: {row['model']} {state}, {row['seconds']:.0f} s")
    console.print(survey.table(rows))
    for line in survey.failures(rows):
        console.print(line, soft_wrap=True)
    refused = sum(bool(row["ok"] and row.get("refused")) for row in rows)
    without = f", {refused} of them without a method that is refused" * bool(refused)
    console.print(f"{sum(row['ok'] for row in rows)} of {len(rows)} models pass every check{without}", style="bold")
