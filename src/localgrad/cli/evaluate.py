"""`localgrad eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from localgrad.cli.console import new_console, new_table
from localgrad.cli.options import Json
from localgrad.errors import CheckpointError, ConfigError


def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="A directory that `localgrad train` wrote.")],
    split: Annotated[
        Literal["test", "val", "validation"] | None,
        typer.Option(
            help="Which images to score: test, or val where the data have no test, is the default; validation are "
            "those that chose the best epoch.",
            show_default=False,
        ),
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The weights of the best validation epoch, not the last ones.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a trained network: its own head and every auxiliary head."""
    from localgrad.train.experiment import build
    from localgrad.train.finished import read_config
    from localgrad.train.folder import RunFolder
    from localgrad.train.meters import evaluate

    settings = read_config(run_dir)
    if settings.beside:
        from localgrad.config import folder_name, run_names

        names = ", ".join(str(run_dir / folder_name(name)) for name in run_names(settings))
        raise ConfigError(f"{run_dir} holds several runs; evaluate one of them: {names}")
    experiment = build(settings)
    folder = RunFolder(run_dir)
    if not folder.restore(experiment):
        raise CheckpointError(f"{run_dir} holds no checkpoint yet; train it for an epoch first")
    epoch = experiment.epoch
    if best:
        if experiment.best is None:
            raise ConfigError(f"{run_dir} has no best epoch: none is finished, or data.validation=0; leave --best out")
        epoch = experiment.best["epoch"]
        experiment.evaluated.load_state_dict(folder.best_weights(experiment))
    scored = experiment.data.scored
    if split not in (None, "validation", scored):
        raise ConfigError(f"--split {split}: {experiment.data.title} has no split of that name; use --split {scored}")
    split = split or scored  # type: ignore[assignment]
    batches = experiment.data.validation if split == "validation" else experiment.data.test
    if batches is None:
        raise ConfigError(f"{run_dir} was trained without a validation split (data.validation=0); use --split {scored}")
    scores = evaluate(experiment.evaluated, batches, experiment.autocast)
    result: dict[str, Any] = {"run": str(run_dir), "split": split, "epoch": epoch, **scores}
    if as_json:
        print(json.dumps(result, indent=2))
        return
    title = f"{experiment.data.title}, {split} split, {batches.num_samples} samples, weights after epoch {epoch}"
    score_name, *others = result["metrics"]
    table = new_table("head", score_name)
    for name, score in result["score"].items():
        table.add_row(name, f"{score:.2%}")
    console = new_console()
    console.print(title, style="bold")
    console.print(table)
    for name in others:
        console.print(f"{name} {result['metrics'][name]:.4g}")
