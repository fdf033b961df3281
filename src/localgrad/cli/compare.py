"""`localgrad compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localgrad.cli.console import new_console
from localgrad.cli.options import Overrides, Recipe, positional, settings_of
from localgrad.errors import ConfigError


def compare(
    recipe: Recipe = None,
    overrides: Overrides = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="dgl+man, or YAML: '[{dgl: {head: linear}}]', then settings of its own: 'e2e train.compile=true'; "
            "may be repeated.",
            show_default=False,
        ),
    ] = None,
    num_blocks: Annotated[
        list[int] | None,
        typer.Option("--num-blocks", "-k", help="K; may be repeated. Default the recipe's.", show_default=False),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="May be repeated. Default the recipe's.", show_default=False)
    ] = None,
    equal_time: Annotated[
        list[str] | None,
        typer.Option(
            help="One of the methods: also train end-to-end for as many epochs as fit in its time, with and without "
            "checkpointing; may be repeated.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep weights and checkpoints of finished runs.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Rows, costs, table and picture; default runs/compare-RECIPE.", show_default=False),
    ] = None,
) -> None:
    """Train many methods with equal data, seeds and epochs, and show score against memory, time and FLOPs.

    End-to-end training, checkpointing and accumulation are always among them.

    [bold]localgrad compare cifar10_resnet32 -m dgl -m '\\[dgl, man_pp]' -k 16 --seed 0 --seed 1 data.limit=20000[/bold]

    A finished run is never run again, a stopped one continues, and several processes may share one --out. With --out
    alone, table and picture are made from what lies there.
    """
    recipe, overrides = positional(recipe, overrides)
    from localgrad.study import compare as study
    from localgrad.study.compare_report import report

    if recipe is None and (out is None or method or overrides):
        raise ConfigError("nothing to compare: name a recipe or a YAML file")
    out = out or Path("runs") / f"compare-{Path(str(recipe)).stem.replace(':', '-')}"
    if recipe is not None:
        study.compare(
            settings_of(recipe, overrides), out, new_console(stderr=True), methods=method or [],
            num_blocks=num_blocks or [], seeds=seed or [], equal_time=equal_time or [], keep=keep,
        )  # fmt: skip
    print(report(out))
