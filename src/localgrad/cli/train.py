"""`localgrad train`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from localgrad.cli.console import new_console, new_table
from localgrad.cli.options import (
    BlocksOption,
    DataOption,
    Json,
    MethodOption,
    ModelOption,
    Overrides,
    Recipe,
    positional,
    settings_of,
)
from localgrad.errors import ConfigError


def train(
    recipe: Recipe = None,
    overrides: Overrides = None,
    method: MethodOption = None,
    num_blocks: BlocksOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.", show_default=False)] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where to write; default runs/RECIPE-METHOD-TIME.", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this directory, with its own settings.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --run-dir.")] = False,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="Ranks along each axis, data=2,block=2, in processes that torchrun starts; also wire=bf16 and "
            "timeout=600, in seconds.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a network block by block (or end to end), and show what it did.

    [bold]localgrad train digits[/bold]

    [bold]localgrad train cifar10_resnet32 --method infopro --num-blocks 8 --epochs 2 optim.lr=0.05[/bold]

    Everything is written to one directory: settings, checkpoints, metrics (CSV, TensorBoard), curves, weights.
    """
    from localgrad import config as configuration
    from localgrad.spec import method_name
    from localgrad.train.finished import read_config

    console = new_console(stderr=as_json)
    recipe, overrides = positional(recipe, overrides)
    if resume is not None:
        flags = {
            "model": model, "data": data, "method": method, "num-blocks": num_blocks,
            "epochs": epochs, "run-dir": run_dir, "overwrite": overwrite,
        }  # fmt: skip
        given = [f"--{name}" for name, value in flags.items() if value is not None and value is not False]
        if recipe is not None or overrides or given:
            refused = ", ".join(word for word in (recipe, *overrides, *given) if word)
            raise ConfigError(f"--resume continues a run with its own settings; leave {refused} out")
        settings, folder = read_config(resume), resume
    else:
        if recipe is None and not (model and data):
            raise ConfigError(
                "nothing to train: name a recipe (localgrad train digits), a YAML file, or both --model and --data"
            )
        settings = settings_of(
            recipe,
            overrides,
            method=method,
            blocks__num_blocks=num_blocks,
            model__name=model,
            data__name=data,
            train__epochs=epochs,
        )
        name = Path(recipe or str(data)).stem.replace("recipe:", "").replace(":", "-")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = run_dir or Path("runs") / f"{name}-{configuration.folder_name(method_name(settings.method))}-{stamp}"
    from localgrad.sealed import write, yaml_text
    from localgrad.train.folder import RunFolder
    from localgrad.train.run import compare

    if parallel is not None:
        _train_parallel(
            console, settings, folder, parallel, run_dir or resume, resume is not None, overwrite, as_json
        )  # fmt: skip
        return
    scaled = _scaled_down(recipe, settings)
    if scaled:
        console.print(f"Not as published: {scaled}.")
    if settings.train.threads == 1:
        console.print("One CPU thread (small networks run slower on more; train.threads=2 changes it).", style="dim")
    multiple = bool(settings.beside)
    if multiple and resume is None:
        whole = RunFolder(folder)
        whole.claim(overwrite=overwrite)
        write(folder / "config.yaml", yaml_text(configuration.dump(settings)))
        whole.close()
    results = compare(
        settings, folder, console, resume=resume is not None, overwrite=overwrite,
        resume_with=f"localgrad train --resume {shlex.quote(str(folder))}",
    )  # fmt: skip
    write(folder / "results.json", json.dumps(results, indent=2) + "\n")
    if as_json:
        print(json.dumps(results, indent=2))
        return
    _show_results(console, results)
    picture = folder / "comparison.png" if multiple else folder / "curves.png"
    console.print(f"Picture: {picture}\nEverything else: {folder}", soft_wrap=True)


def _train_parallel(
    console: Console, settings: Any, folder: Path, layout: str, named: Path | None, resume: bool, overwrite: bool,
    as_json: bool,
) -> None:  # fmt: skip
    from localgrad.sealed import write
    from localgrad.train import parallel

    if named is None:
        raise ConfigError("--parallel needs --run-dir, which all ranks and every restart share")
    result = parallel.run(settings, folder, parallel.parsed(layout), console, resume=resume, overwrite=overwrite)
    if result is None:
        return
    write(folder / "results.json", json.dumps([result], indent=2) + "\n")
    if as_json:
        print(json.dumps([result], indent=2))
        return
    _show_results(console, [result])
    console.print(f"Everything: {folder}", soft_wrap=True)


def _scaled_down(recipe: str | None, settings: Any) -> str:
    """What a run changes of a recipe that reproduces a published row."""
    from localgrad import config
    from localgrad.recipes import read_recipe
    from localgrad.spec import method_name
    from localgrad.train.experiment import FREE

    if recipe is None or "=" in recipe or not settings.about.published:
        return ""
    original = config.validate(read_recipe(recipe), recipe)
    changes = []
    for section in ("model", "data", "blocks", "optim", "train"):
        old, new = (dataclasses.asdict(getattr(c, section)) for c in (original, settings))
        changes += [
            f"{section}.{key} is {new[key]} instead of {old[key]}"
            for key in old
            if old[key] != new[key] and f"{section}.{key}" not in FREE
        ]
    if original.method != settings.method:
        changes.append(f"method is {method_name(settings.method)} instead of {method_name(original.method)}")
    return ", ".join(changes)


def _show_results(console: Console, results: list[dict[str, Any]]) -> None:
    first = results[0]
    reference = next((r for r in results if r["method"] == "e2e"), None)
    title = f"{first['model']} in {first['blocks']} blocks on {first['data']}, {first['epochs']} epochs"
    title += f", seed {first['seed']}"
    score_name = next(iter(first["last"]["metrics"]))
    split, batch_size = first["split"], first["cost"]["batch_size"]
    console.print(
        f"\n{title}\n{split.capitalize()} {score_name}, and cost of a training step of {batch_size} samples",
        style="bold",
    )
    table = new_table(
        "method", "last\nepoch", "best\nepoch*", "activa-\ntions", "time", "FLOPs", "auxiliary\nparameters"
    )

    def against(result: dict[str, Any], key: str) -> str:
        return f"\n{result['cost'][key] / reference['cost'][key]:.2f}x" if reference not in (None, result) else ""

    for result in results:
        costs = result["cost"]
        best = result.get("best")
        table.add_row(
            result["method"],
            f"{result['last']['score']['model']:.2%}",
            f"{best['score']['model']:.2%}\n({best['epoch']})" if best else "-",
            f"{costs['activation_bytes'] / 2**20:.2f} MiB" + against(result, "activation_bytes"),
            f"{costs['step_seconds'] * 1e3:.1f} ms" + against(result, "step_seconds"),
            f"{costs['flops'] / 1e9:.2f} G" + against(result, "flops"),
            f"{costs['auxiliary_parameters']:,}\n{costs['auxiliary_parameters'] / costs['parameters']:.2f}x",
        )
    console.print(table)
    remarks = ["x: of e2e; auxiliary parameters: of the model's"] if reference else []
    remarks += [f"*: selected on the validation split, never on {split}"] if first.get("best") else []
    for remark in remarks:
        console.print(remark, style="dim")
    for result in results:
        costs = result["cost"]
        if "plain_step_seconds" in costs:
            plain, compiled = costs["plain_step_seconds"], costs["step_seconds"]
            console.print(
                f"{result['method']}: compiled, a step takes {compiled * 1e3:.1f} ms instead of {plain * 1e3:.1f} ms "
                f"({compiled / plain:.2f}x)"
            )
        if result["steps_as"]:
            console.print(f"{result['method']}: {result['steps_as']}")
        heads = {name: score for name, score in result["last"]["score"].items() if name != "model"}
        if heads:
            console.print(
                f"{result['method']}: {split} {score_name} of every head: "
                + ", ".join(f"{name} {score:.1%}" for name, score in heads.items())
                + f", model {result['last']['score']['model']:.1%}",
            )
