"""`localgrad export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from localgrad.cli.console import new_console


def export(
    run_dir: Annotated[Path, typer.Argument(help="A directory that `localgrad train` wrote.")],
    to: Annotated[Path, typer.Option(help="The file to write; one that is there is not replaced.")],
    form: Annotated[
        Literal["onnx", "torch"], typer.Option("--format", help="ONNX, or a program for torch.export.load.")
    ] = "onnx",
    block: Annotated[
        int | None,
        typer.Option(help="Only blocks 1 to this one, and the auxiliary head behind it.", show_default=False),
    ] = None,
) -> None:
    """Write a trained network, or its first blocks, as a file that runs without localgrad.

    [bold]localgrad export runs/RUN --format onnx --to model.onnx[/bold]
    """
    from localgrad.train.export import export

    said = export(run_dir, to, form, block)
    new_console().print(f"{to}: {said}", soft_wrap=True)
