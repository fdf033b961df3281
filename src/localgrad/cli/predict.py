"""`localgrad predict`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from localgrad.cli.console import new_console
from localgrad.cli.options import Json
from localgrad.errors import ConfigError


def predict(
    run_dir: Annotated[Path, typer.Argument(help="A directory that `localgrad train` wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Where pictures go.")] = Path("predictions"),
    min_score: Annotated[float, typer.Option(help="Of boxes that are drawn.", min=0.0, max=1.0)] = 0.3,
    as_json: Json = False,
) -> None:
    """Show pictures to a trained network: their classes, their masks laid over them, or boxes drawn into them.

    [bold]localgrad predict runs/RUN street.jpg --out predictions[/bold]
    """
    from localgrad.data.pictures import SUFFIXES
    from localgrad.train.predict import load_trained, predict, write

    files = []
    for path in images:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path} holds no picture; known endings: {', '.join(SUFFIXES)}")
        files += found
    rows = []
    trained = dataclasses.replace(load_trained(run_dir), min_score=min_score)
    for prediction in predict(trained, files):
        written = [str(path) for path in write(prediction, out)]
        rows.append({"image": str(prediction.image), "answer": prediction.summary, "written": written})
        if not as_json:
            new_console().print(f"{prediction.image}: {prediction.summary}", *written, sep="\n  ", soft_wrap=True)
    if as_json:
        print(json.dumps(rows, indent=2))
