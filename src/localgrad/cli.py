"""The command line. Commands are thin; torch is imported when one runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from localgrad.errors import ConfigError, LocalgradError

app = typer.Typer(
    name="localgrad",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Supervised local learning for PyTorch: cut a network into blocks, train each by its own loss, and free its "
    "activations before the next one runs.",
    epilog="Begin with: localgrad train digits",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.NAME=VALUE]...", help="Settings to change, for instance optim.lr=0.05.", show_default=False
    ),
]
Recipe = Annotated[
    str | None,
    typer.Argument(help="A recipe (see: localgrad list recipes) or the path of a YAML file.", show_default=False),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method", "-m", help="Base and plug-ins, inner to outer: dgl, infopro, e2e+checkpointing.", show_default=False
    ),
]
BlocksOption = Annotated[
    int | None, typer.Option("--num-blocks", "-k", help="Blocks to cut the model into.", show_default=False)
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="resnet32, timm:NAME or torchvision:NAME.", show_default=False)
]
DataOption = Annotated[
    str | None, typer.Option("--data", help="A data set (see: localgrad list data).", show_default=False)
]
DataRoot = Annotated[
    str | None,
    typer.Option(
        "--data-root", help="Folder of the data sets; default $LOCALGRAD_DATA, else ../shared/data.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def _positional(recipe: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """Recipe and overrides; the first argument is an override too if it looks like one."""
    overrides = list(overrides or [])
    if recipe is not None and re.match(r"[\w.]+=", recipe):
        return None, [recipe, *overrides]
    return recipe, overrides


def _settings(recipe: str | None, overrides: list[str] | None, **flags: Any) -> Any:
    """The configuration a command line describes: recipe, then SECTION.NAME=VALUE, then flags."""
    from localgrad import config

    settings: dict[str, Any] = {} if recipe is None else config.read_recipe(recipe)
    settings = config.override(settings, overrides or [])
    changes: dict[str, Any] = {}
    for key, value in flags.items():
        if value is not None:
            section, _, name = key.partition("__")
            if name:
                changes.setdefault(section, {})[name] = value
            else:
                changes[section] = value
    if "num_blocks" in changes.get("blocks", {}):
        changes["blocks"]["cuts"] = None
    if isinstance(changes.get("method"), str):
        changes["method"] = config.parse_method(changes["method"])
    settings = config.merge(settings, changes)
    settings.setdefault("method", ["dgl"])
    return config.validate(settings, recipe or "command line")


@app.command()
def train(
    recipe: Recipe = None,
    overrides: Overrides = None,
    method: MethodOption = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="Another method to train with the same settings, for comparison; may be repeated.", show_default=False
        ),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Train no method beside it, whatever the recipe says.")
    ] = False,
    num_blocks: BlocksOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    data_root: DataRoot = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step.", show_default=False)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of weights, order, augmentation and dropout.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:1.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default=False)] = None,
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
            help="Ranks along each axis, data=2,block=2, in processes that torchrun starts.", show_default=False
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="With --parallel: seconds a rank waits for another one.")] = 600.0,
    wire: Annotated[
        Literal["same", "bf16", "int8"] | None,
        typer.Option(
            help="With --parallel: how features travel between ranks; all but same, the default, round them.",
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

    console = _console(stderr=as_json)
    recipe, overrides = _positional(recipe, overrides)
    if resume is not None:
        flags = {
            "model": model, "data": data, "method": method, "beside": beside, "alone": alone, "num-blocks": num_blocks,
            "epochs": epochs, "batch-size": batch_size, "seed": seed, "device": device, "threads": threads,
            "run-dir": run_dir, "overwrite": overwrite,
        }  # fmt: skip
        given = [f"--{name}" for name, value in flags.items() if value is not None and value is not False]
        if recipe is not None or overrides or given:
            refused = ", ".join(word for word in (recipe, *overrides, *given) if word)
            raise ConfigError(f"--resume continues a run with its own settings; leave {refused} out")
        settings, folder = _resumed(resume, data_root), resume
    else:
        if recipe is None and not (model and data):
            raise ConfigError(
                "nothing to train: name a recipe (localgrad train digits), a YAML file, or both --model and --data"
            )
        settings = _settings(
            recipe,
            overrides,
            method=method,
            beside=[] if alone else [configuration.parse_method(b) for b in beside] if beside else None,
            blocks__num_blocks=num_blocks,
            model__name=model,
            data__name=data,
            data__root=data_root,
            train__epochs=epochs,
            train__batch_size=batch_size,
            train__seed=seed,
            train__device=device,
            train__threads=threads,
        )
        name = Path(recipe or str(data)).stem.replace("recipe:", "").replace(":", "-")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = (
            run_dir or Path("runs") / f"{name}-{configuration.method_name(settings.method).replace('+', '-')}-{stamp}"
        )
    from localgrad.train.folder import RunFolder, write
    from localgrad.train.run import compare

    if parallel is not None:
        _train_parallel(
            console, settings, folder, parallel, run_dir or resume, resume is not None, overwrite, timeout, wire,
            as_json,
        )  # fmt: skip
        return
    if wire not in (None, "same"):
        raise ConfigError(f"--wire {wire} is for blocks on several ranks; add --parallel block=2, under torchrun")
    scaled = _scaled_down(recipe, settings)
    if scaled:
        console.print(f"Not as published: {scaled}.")
    if settings.train.threads == 1:
        console.print("One CPU thread (small networks run slower on more; --threads changes it).", style="dim")
    multiple = bool(settings.beside)
    if multiple and resume is None:
        RunFolder(folder, overwrite=overwrite)
        write(folder / "config.yaml", configuration.dump(settings))
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
    timeout: float, wire: Literal["same", "bf16", "int8"] | None, as_json: bool,
) -> None:  # fmt: skip
    from localgrad.distributed import run
    from localgrad.train.folder import write

    axes = run.parsed(layout)
    if named is None:
        raise ConfigError("--parallel needs --run-dir, which all ranks and every restart share")
    result = run.run(settings, folder, axes, console, resume=resume, overwrite=overwrite, timeout=timeout, wire=wire)
    if result is None:
        return
    write(folder / "results.json", json.dumps([result], indent=2) + "\n")
    if as_json:
        print(json.dumps([result], indent=2))
        return
    _show_results(console, [result])
    console.print(f"Everything: {folder}", soft_wrap=True)


def _resumed(folder: Path, data_root: str | None) -> Any:
    """The settings of the run in a directory; its data may have moved."""
    from localgrad.train.folder import read_config

    settings = read_config(folder)
    if data_root is not None:
        settings.data.root = data_root
    return settings


def _console(stderr: bool = False) -> Console:
    """Prints words as they are: `localgrad[timm]` is no markup."""
    return Console(stderr=stderr, markup=False, highlight=False)


def _table(*headings: str, left: int = 1) -> Table:
    """A table that fits 80 columns as long as its words do; ``left`` columns are text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", overflow="fold", no_wrap=index == 0)
    return table


def _scaled_down(recipe: str | None, settings: Any) -> str:
    """What a run changes of a recipe that reproduces a published row."""
    from localgrad import config

    if recipe is None or "=" in recipe or not settings.about.published:
        return ""
    original = config.validate(config.read_recipe(recipe), recipe)
    changes = []
    for section in ("model", "data", "blocks", "optim", "train"):
        old, new = (dataclasses.asdict(getattr(c, section)) for c in (original, settings))
        changes += [
            f"{section}.{key} is {new[key]} instead of {old[key]}"
            for key in old
            if old[key] != new[key] and key not in ("root", "workers", "device", "threads", "checkpoint_every")
        ]
    if original.method != settings.method:
        changes.append(
            f"method is {config.method_name(settings.method)} instead of {config.method_name(original.method)}"
        )
    return ", ".join(changes)


def _show_results(console: Console, results: list[dict[str, Any]]) -> None:
    first = results[0]
    reference = next((r for r in results if r["method"] == "e2e"), None)
    title = f"{first['model']} in {first['blocks']} blocks on {first['data']}, {first['epochs']} epochs"
    title += f", seed {first['seed']}"
    score_name = next(iter(first["last"]["metrics"]))
    console.print(
        f"\n{title}\nTest {score_name}, and cost of a training step of {first['cost']['batch_size']} images",
        style="bold",
    )
    table = _table("method", "last\nepoch", "best\nepoch*", "activa-\ntions", "time", "FLOPs", "auxiliary\nparameters")

    def against(result: dict[str, Any], key: str) -> str:
        return f"\n{result['cost'][key] / reference['cost'][key]:.2f}x" if reference not in (None, result) else ""

    for result in results:
        costs = result["cost"]
        best = result.get("best")
        table.add_row(
            result["method"],
            f"{result['last']['test']['model']:.2%}",
            f"{best['test']['model']:.2%}\n({best['epoch']})" if best else "-",
            f"{costs['activation_bytes'] / 2**20:.2f} MiB" + against(result, "activation_bytes"),
            f"{costs['step_seconds'] * 1e3:.1f} ms" + against(result, "step_seconds"),
            f"{costs['flops'] / 1e9:.2f} G" + against(result, "flops"),
            f"{costs['auxiliary_parameters']:,}\n{costs['auxiliary_parameters'] / costs['parameters']:.2f}x",
        )
    console.print(table)
    remarks = ["x: of e2e; auxiliary parameters: of the model's"] if reference else []
    remarks += ["*: selected on the validation split, never on test"] if first.get("best") else []
    for remark in remarks:
        console.print(remark, style="dim")
    for result in results:
        heads = {name: score for name, score in result["last"]["test"].items() if name != "model"}
        if heads:
            console.print(
                f"{result['method']}: test {score_name} of every head: "
                + ", ".join(f"{name} {score:.1%}" for name, score in heads.items())
                + f", model {result['last']['test']['model']:.1%}",
            )


@app.command("eval")
def evaluate_command(
    run_dir: Annotated[Path, typer.Argument(help="A directory that `localgrad train` wrote.")],
    split: Annotated[Literal["test", "validation"], typer.Option(help="Which images to score.")] = "test",
    best: Annotated[
        bool, typer.Option("--best", help="The weights of the best validation epoch, not the last ones.")
    ] = False,
    data_root: DataRoot = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:1.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Score a trained network: its own head and every auxiliary head."""
    from localgrad.train.experiment import build
    from localgrad.train.folder import RunFolder
    from localgrad.train.meters import evaluate

    settings = _resumed(run_dir, data_root)
    if settings.beside:
        from localgrad.config import run_names

        names = ", ".join(str(run_dir / name.replace("+", "-")) for name in run_names(settings))
        raise ConfigError(f"{run_dir} holds several runs; evaluate one of them: {names}")
    if device is not None:
        settings.train.device = device
    experiment = build(settings)
    folder = RunFolder(run_dir, resume=True)
    remark = folder.restore(experiment)
    if remark:
        _console(stderr=True).print(remark, soft_wrap=True)
    epoch = experiment.epoch
    if best:
        if experiment.best is None:
            raise ConfigError(f"{run_dir} has no best epoch: none is finished, or data.validation=0; leave --best out")
        epoch = experiment.best["epoch"]
        experiment.evaluated.load_state_dict(folder.best_weights(epoch))
    batches = experiment.data.validation if split == "validation" else experiment.data.test
    if batches is None:
        raise ConfigError(f"{run_dir} was trained without a validation split (data.validation=0); use --split test")
    scores = evaluate(experiment.evaluated, batches, experiment.autocast)
    result: dict[str, Any] = {"run": str(run_dir), "split": split, "epoch": epoch, **scores}
    if as_json:
        print(json.dumps(result, indent=2))
        return
    title = f"{experiment.data.title}, {split} split, {batches.num_images} images, weights after epoch {epoch}"
    score_name, *others = result["metrics"]
    table = _table("head", score_name)
    for name, score in result["score"].items():
        table.add_row(name, f"{score:.2%}")
    console = _console()
    console.print(title, style="bold")
    console.print(table)
    for name in others:
        console.print(f"{name} {result['metrics'][name]:.2%}")


@app.command("predict")
def predict_command(
    run_dir: Annotated[Path, typer.Argument(help="A directory that `localgrad train` wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Where pictures go.")] = Path("predictions"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    min_score: Annotated[float, typer.Option(help="Of boxes that are drawn.", min=0.0, max=1.0)] = 0.3,
    as_json: Json = False,
) -> None:
    """Show pictures to a trained network: their classes, their masks laid over them, or boxes drawn into them.

    [bold]localgrad predict runs/RUN street.jpg --out predictions[/bold]
    """
    from localgrad.data.masks import IMAGE_SUFFIXES
    from localgrad.predict import load_trained, predict, write

    files = []
    for path in images:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path} holds no picture; known endings: {', '.join(IMAGE_SUFFIXES)}")
        files += found
    rows = []
    trained = dataclasses.replace(load_trained(run_dir, device), min_score=min_score)
    for prediction in predict(trained, files):
        written = [str(path) for path in write(prediction, out)]
        rows.append({"image": str(prediction.image), "answer": prediction.summary, "written": written})
        if not as_json:
            _console().print(f"{prediction.image}: {prediction.summary}", *written, sep="\n  ", soft_wrap=True)
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def simulate(
    model: Annotated[str, typer.Argument(help="resnet32, timm:NAME or torchvision:NAME.")],
    ranks: Annotated[int, typer.Option(help="Devices like this one.")] = 4,
    num_blocks: Annotated[int, typer.Option("--num-blocks", "-k", help="Blocks to cut the model into.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Images of one replica in a step.")] = 32,
    image_size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 32,
    num_classes: Annotated[int, typer.Option(help="Of the data.")] = 10,
    bandwidth: Annotated[float, typer.Option(help="Of a link, Mbit/s.")] = 1000.0,
    latency: Annotated[float, typer.Option(help="Of a link, ms.")] = 1.0,
    micro_batches: Annotated[int, typer.Option(help="Of the end-to-end pipelines.")] = 8,
    sync_every: Annotated[int, typer.Option(help="Steps between two averages of replicas.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads while measuring.")] = 1,
    as_json: Json = False,
) -> None:
    """Forecast how fast several devices would train, and by which layout: blocks are timed here, links are assumed.

    Compares block-parallel local learning (DGL heads) with GPipe, 1F1B and data parallelism.
    """
    import torch

    from localgrad import methods, models, tasks
    from localgrad.distributed import simulate as simulator
    from localgrad.network import localize

    torch.set_num_threads(threads)
    built = models.create(model, num_classes=num_classes, in_channels=3, image_size=image_size)
    x, y = torch.randn(batch_size, 3, image_size, image_size), torch.arange(batch_size) % num_classes
    network = localize(built, methods.dgl(tasks.classification(num_classes)), num_blocks=num_blocks, example=x[:2])
    costs = simulator.measured(network.train(), x, y)
    link = simulator.LinkSpeed(bandwidth * 1e6 / 8, latency / 1e3)
    found = simulator.layouts(costs, link, batch_size, ranks, micro_batches=micro_batches, sync_every=sync_every)
    if as_json:
        rows = [{k: v for k, v in dataclasses.asdict(f).items() if k != "events"} for f in found]
        print(json.dumps({"blocks": [dataclasses.asdict(cost) for cost in costs], "layouts": rows}, indent=2))
        return
    console = _console()
    console.print(f"{model} in {num_blocks} blocks, batch {batch_size}, {threads} CPU threads", style="bold")
    table = _table("block", "forward", "heads and\nbackward", "sent", "parameters")
    for index, cost in enumerate(costs):
        table.add_row(
            str(index + 1), f"{cost.forward * 1e3:.1f} ms", f"{cost.rest * 1e3:.1f} ms",
            f"{cost.features / 2**20:.2f} MiB", f"{cost.parameters / 2**20:.2f} MiB",
        )  # fmt: skip
    console.print(table)
    table = _table("layout", "blocks on", "samples/s", "step", "waiting", "MiB a step,\nbusiest link", left=2)
    for f in found:
        table.add_row(
            f"{f.schedule}, {f.ranks[0]} x {f.ranks[1]}", " ".join(map(str, f.place)), f"{f.samples_per_second:.0f}",
            f"{f.seconds * 1e3:.0f} ms", f"{f.bubble:.0%}", f"{f.bytes_per_step / 2**20:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "layout: ranks along the blocks x replicas; local is block-parallel local learning, data trains end to"
    )
    console.print("end on every rank; a backward pass is taken to cost two forward passes.", style=None)


@app.command("list")
def list_command(
    what: Annotated[Literal["models", "methods", "data", "recipes"], typer.Argument(help="What to list.")],
    only: Annotated[
        str | None,
        typer.Argument(help="With recipes: those of a folder (man), or whose names hold this.", show_default=False),
    ] = None,
    library: Annotated[
        str | None, typer.Option(help="With models: all of timm or torchvision.", show_default=False)
    ] = None,
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """List what there is: models, methods, data, recipes."""
    if library is not None and what != "models":
        raise ConfigError(f"--library {library} goes with `localgrad list models`, not with `list {what}`")
    if only is not None and what != "recipes":
        raise ConfigError(f"{only!r} goes with `localgrad list recipes`, not with `list {what}`")
    rows = (
        {"models": _models, "methods": _methods, "recipes": _recipes}[what](only if what == "recipes" else library)
        if what != "data"
        else _data(data_root)
    )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if what == "recipes":
        _show_recipes(_console(), rows)
        return
    table = _table(*(rows[0] if rows else ()), left=9)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    _console().print(table)
    if what == "models" and library is None:
        _console().print("And every model of timm and torchvision: localgrad list models --library timm")


def _models(library: str | None) -> list[dict[str, Any]]:
    from localgrad import models

    if library is not None:
        return [{"name": name} for name in models.available(library)]
    return [{"name": name, "what": (models.OWN[name].__doc__ or "").strip()} for name in models.available()]


def _methods(_: str | None) -> list[dict[str, Any]]:
    from localgrad import config, methods

    return [
        {
            "name": name,
            "kind": "base" if base else "plug-in",
            "what": (getattr(methods, name).__doc__ or "").strip().splitlines()[0],
        }
        for name, base in sorted(config.known_methods().items(), key=lambda item: (not item[1], item[0]))
    ]


def _recipes(only: str | None) -> list[dict[str, Any]]:
    from localgrad import config

    known = config.recipes()
    names = list(known)
    if only is not None:
        begin = [name for name in names if name.startswith(only.rstrip("/") + "/")]
        names = begin or [name for name in names if only in name]
        if not names:
            folders = dict.fromkeys(name.partition("/")[0] for name in known if "/" in name)
            raise ConfigError(f"no recipe is called like {only!r}; folders: {', '.join(folders)}")
    costs = config.recipe_costs()
    rows = []
    for name in names:
        recipe = config.validate(config.read_recipe(name), name)
        rows.append(
            {
                "name": name,
                "model": recipe.model.name,
                "data": recipe.data.name,
                "method": config.method_name(recipe.method),
                "options": recipe.method,
                "blocks": recipe.blocks.num_blocks or len(recipe.blocks.cuts or []) + 1,
                "epochs": recipe.train.epochs,
                **dataclasses.asdict(recipe.about),
                "cost": costs.get(name),
            }
        )
    return rows


def _show_recipes(console: Console, rows: list[dict[str, Any]]) -> None:
    """A table for each folder; less of it where the terminal is narrow."""
    wide = console.width >= 110
    headings = ["recipe", "row", "published", "FLOPs*", "bytes*", "heads*", "PFLOP"]
    shown = headings if wide else ["recipe", "published", "FLOPs*", "bytes*"]
    folders = sorted({row["name"].rpartition("/")[0] for row in rows})
    for folder in folders:
        members = [row for row in rows if row["name"].rpartition("/")[0] == folder]
        papers = list(dict.fromkeys(row["paper"] for row in members if row["paper"]))
        if papers:
            console.print(f"{folder}: {'; '.join(papers)}", style="bold")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for name in shown:
            left = name in ("recipe", "row", "published")
            table.add_column(name, justify="left" if left else "right", no_wrap=name == "recipe" or not left)
        for row in members:
            cells = {"recipe": row["name"], "published": row["published"] or "-", **_relative(row["cost"])}
            cells["row"], paper = row["table"] or row["notes"], row["paper"].partition(",")[0]
            if len(papers) > 1 and not cells["row"].startswith(paper):
                cells["row"] = f"{paper}: {cells['row']}"
            table.add_row(*(cells[name] for name in shown))
        console.print(table)
    remarks = "* FLOPs and bytes (activations) of a training step, as ratios to end-to-end training of the same network"
    remarks += "; heads: parameters trained besides the model's, as a ratio to these; PFLOP: of the whole run" * wide
    console.print(remarks + ". Notes, evidence and everything else: --json", style="dim")


def _relative(cost: dict[str, Any] | None) -> dict[str, str]:
    """The cells that say what a recipe costs."""
    if cost is None:
        return dict.fromkeys(("FLOPs*", "bytes*", "heads*", "PFLOP"), "-")
    pflops = cost["pflops"]
    return {
        "FLOPs*": f"{cost['flops'] / cost['e2e_flops']:.2f}",
        "bytes*": f"{cost['activation_bytes'] / cost['e2e_activation_bytes']:.2f}",
        "heads*": f"{cost['auxiliary_parameters'] / cost['parameters']:.2f}",
        "PFLOP": f"{pflops:,.0f}" if pflops >= 100 else f"{pflops:.3g}" if pflops >= 0.01 else "<0.01",
    }


def _data(root: str | None) -> list[dict[str, Any]]:
    from localgrad import data

    return [
        {"name": found.name, "title": found.title, "found": "yes" if found.found else "no", "where": str(found.where)}
        for found in data.available(root)
    ]


@app.command()
def summary(
    recipe: Recipe = None,
    overrides: Overrides = None,
    method: MethodOption = None,
    num_blocks: BlocksOption = None,
    model: ModelOption = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Sides of the square images; default as the recipe's data, else 32.", show_default=False),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(help="Channels of the images; default as the recipe's data, else 3.", show_default=False),
    ] = None,
    num_classes: Annotated[int, typer.Option(help="Classes.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images in the measured step.")] = 16,
    as_json: Json = False,
) -> None:
    """Show each block: where it begins, parameters, FLOPs and activations, and totals as ratios to end-to-end.

    [bold]localgrad summary --model torchvision:resnet50 --method dgl --num-blocks 4 --image-size 64[/bold]
    """
    recipe, overrides = _positional(recipe, overrides)
    if recipe is None and model is None:
        raise ConfigError(
            "nothing to summarise: name a recipe or a --model, for instance --model resnet32 --num-blocks 8"
        )
    settings = _settings(recipe, overrides, method=method, blocks__num_blocks=num_blocks, model__name=model)
    from localgrad.bench.summary import summarize
    from localgrad.data.sources import SOURCES

    known = SOURCES.get(settings.data.name if recipe is not None else "")
    sides = settings.data.crop_size or settings.data.image_size or (known.shape[1] if known else 32)
    if image_size is not None:
        sides = image_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    if channels is None:
        channels = known.shape[0] if known else 3
    if min(height, width, channels, batch_size) < 1:
        raise ConfigError(
            f"--image-size {height}, --channels {channels}, --batch-size {batch_size}: all are at least 1"
        )
    result = summarize(settings, (channels, height, width), num_classes, batch_size)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    title = f"{result['model']}, {result['method']}, batch of {batch_size} images {channels}x{height}x{width}"
    table = _table("block", "begins at", "features", "parameters", "MFLOPs", "MiB saved", left=3)
    for row in result["blocks"]:
        parameters = row["head_parameters"] + row["twin_parameters"]
        own = [f"{row['parameters']:,}", f"{row['flops'] / 1e6:,.1f}", f"{row['saved_bytes'] / 2**20:.2f}"]
        heads = [f"{parameters:,}", f"{row['head_flops'] / 1e6:,.1f}", f"{row['head_saved_bytes'] / 2**20:.2f}"]
        if parameters:
            own = [f"{a}\n+ {b}" for a, b in zip(own, heads, strict=True)]
        table.add_row(str(row["block"]), row["begins_at"], "x".join(map(str, row["features"])), *own)
    console = _console()
    console.print(title, style="bold")
    console.print(table)
    console.print("+ what the auxiliary networks on the block's output add", style="dim")
    total, e2e = result["total"], result["e2e"]
    console.print(
        f"One training step, {result['method']} against end-to-end: activations "
        f"{total['activation_bytes'] / 2**20:.2f} of {e2e['activation_bytes'] / 2**20:.2f} MiB "
        f"({total['activation_bytes'] / e2e['activation_bytes']:.2f}x), with checkpointing at the same boundaries "
        f"{result['checkpointing']['activation_bytes'] / e2e['activation_bytes']:.2f}x; FLOPs "
        f"{total['flops'] / e2e['flops']:.2f}x (checkpointing {result['checkpointing']['flops'] / e2e['flops']:.2f}x); "
        f"training parameters {(total['parameters'] + total['auxiliary_parameters']) / e2e['parameters']:.2f}x.",
    )


@app.command()
def doctor(data_root: DataRoot = None, as_json: Json = False) -> None:
    """Show versions, devices and the data found, and say what is wrong with them."""
    from localgrad.bench.doctor import findings

    rows = findings(data_root)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        table = _table("what", "found", "remark", left=3)
        for row in rows:
            table.add_row(row["what"], row["found"], row["remark"])
        _console().print(table)


@app.command("survey")
def survey_command(
    library: Annotated[Literal["timm", "torchvision"], typer.Argument(help="Whose models.")],
    pattern: Annotated[str, typer.Option("--filter", help="Shell pattern of names, for instance 'vit_*'.")] = "*",
    every: Annotated[
        bool, typer.Option("--all", help="Every variant, not only the smallest of each of timm's families.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Models at a time, one process and thread each.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds one model may take.")] = 600.0,
    out: Annotated[
        Path | None, typer.Option(help="Rows are appended here; default survey-LIBRARY.jsonl.", show_default=False)
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run models again whose rows in the file failed.")] = False,
    as_json: Json = False,
) -> None:
    """Check every model of a library: cut, compared with the model itself, and trained.

    [bold]localgrad survey torchvision --filter 'resnet*'[/bold]

    Models whose rows are in the file already are not run again.
    """
    from localgrad import survey

    console, progress = _console(), _console(stderr=True)
    out = out or Path(f"survey-{library}.jsonl")
    selection = survey.select(library, pattern, every=every, cache=out.with_suffix(".families.json"))
    rows = []
    for row, new in survey.survey(library, selection, out, workers=workers, timeout=timeout, retry=retry):
        rows.append(row)
        if new:
            state = "ok" if row["ok"] else "FAILED: " + ", ".join(row["reasons"])
            progress.print(f"{len(rows)} of {len(selection)}: {row['model']} {state}, {row['seconds']:.0f} s")
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    console.print(survey.table(rows))
    for line in survey.failures(rows):
        console.print(line, soft_wrap=True)
    console.print(f"{sum(row['ok'] for row in rows)} of {len(rows)} models pass every check", style="bold")


@app.command("plan")
def plan_command(
    model: Annotated[str, typer.Argument(help="resnet32, timm:NAME or torchvision:NAME.")],
    batch_size: Annotated[int, typer.Option(help="Images in a step.")],
    memory: Annotated[str | None, typer.Option(help="What there is, such as 8GiB.", show_default=False)] = None,
    image_size: Annotated[int, typer.Option(help="Sides of the square images.")] = 224,
    channels: Annotated[int, typer.Option(help="Channels of the images.")] = 3,
    num_classes: Annotated[int, typer.Option(help="Classes.")] = 1000,
    method: Annotated[
        str, typer.Option("--method", "-m", help="Of local learning: dgl+man, or YAML: '[{dgl: {head: linear}}]'.")
    ] = "dgl",
    optimizer: Annotated[Literal["sgd", "adamw"], typer.Option(help="SGD has momentum.")] = "sgd",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="bf16 is autocast.")] = "fp32",
    headroom: Annotated[float, typer.Option(help="Share of the memory left free.")] = 0.1,
    tflops: Annotated[
        float | None,
        typer.Option(help="TFLOP/s of the device that will train; default measured here.", show_default=False),
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Its GB/s, with --tflops.", show_default=False)] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw memory against time here.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Say before training what fits: peak memory and step time of every way to train a model.

    [bold]localgrad plan torchvision:resnet152 --batch-size 64 --memory 8GiB[/bold]
    """
    import yaml

    from localgrad.planning import Rates, plan

    if (tflops is None) != (bandwidth is None):
        raise ConfigError("--tflops and --bandwidth describe one device: give both, or none to measure this one")
    rates = None if tflops is None or bandwidth is None else Rates(tflops * 1e12, bandwidth * 1e9)
    try:
        spec = yaml.safe_load(method) if method.startswith("[") else method
    except yaml.YAMLError as error:
        raise ConfigError(f"--method {method} is no YAML; write '[{{dgl: {{head: linear}}}}]'") from error
    found = plan(
        model, batch_size=batch_size, memory=memory, image_size=image_size, channels=channels,
        num_classes=num_classes, method=spec, optimizer=optimizer, precision=precision, headroom=headroom,
        rates=rates,
    )  # fmt: skip
    if picture is not None:
        found.picture(picture)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    console = _console()
    console.print(str(found), soft_wrap=True)
    if found.code:
        console.print(f"\n{found.code}", soft_wrap=True)
    if picture is not None:
        console.print(f"\nPicture: {picture}", soft_wrap=True)


@app.command("bench")
def bench_command(
    model: Annotated[str, typer.Argument(help="resnet32, timm:NAME or torchvision:NAME.")],
    batch_size: Annotated[int, typer.Option(help="Images in a step.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", help="dgl+man, or YAML: '[{dgl: {head: linear}}]'; may be repeated. Default dgl."
        ),
    ] = None,
    num_blocks: Annotated[
        list[int] | None, typer.Option("--num-blocks", "-k", help="K; may be repeated. Default 4.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="fp32 or bf16, with +channels_last and +compile; may be repeated. Default fp32."),
    ] = None,
    balance: Annotated[Literal["count", "bytes"], typer.Option(help="What blocks have equally much of.")] = "count",
    parts: Annotated[int, typer.Option(help="Micro-batches of accumulation.")] = 4,
    combinations: Annotated[
        bool, typer.Option(help="Also per-block steps, recomputation inside blocks and micro-batches of each method.")
    ] = True,
    image_size: Annotated[int, typer.Option(help="Sides of the square images.")] = 224,
    channels: Annotated[int, typer.Option(help="Channels of the images.")] = 3,
    num_classes: Annotated[int, typer.Option(help="Classes.")] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed steps of each way.")] = 5,
    seed: Annotated[int, typer.Option(help="Of weights and images.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw memory against time here.", show_default=False)] = None,
    accuracy: Annotated[
        Path | None,
        typer.Option(help="JSON with test accuracies by way, for the picture.", show_default=False),
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw what is alive during a step here.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write everything as JSON here.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Measure training steps of a model by many ways, in turn: memory, time, FLOPs, and which way is worth it.

    End-to-end training, checkpointing and accumulation are always among them.

    [bold]localgrad bench resnet32 --batch-size 64 --image-size 32 --num-classes 10 -m dgl -k 4 -k 16[/bold]
    """
    from localgrad.bench import contest_command

    console = _console(stderr=True)
    found = contest_command.run(
        model, method or ["dgl"], num_blocks or [4], variant or ["fp32"], balance=balance, parts=parts,
        combinations=combinations, batch_size=batch_size, image_size=image_size, channels=channels,
        num_classes=num_classes, device=device, threads=threads, rounds=rounds, seed=seed, picture=picture,
        accuracy=accuracy, timeline=timeline, out=out, progress=lambda what: console.print(what, style="dim"),
    )  # fmt: skip
    print(json.dumps(found.as_dict(), indent=2) if as_json else found)


@app.command("compare")
def compare_command(
    recipe: Recipe = None,
    overrides: Overrides = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", help="dgl+man, or YAML: '[{dgl: {head: linear}}]'; may be repeated.", show_default=False
        ),
    ] = None,
    num_blocks: Annotated[
        list[int] | None,
        typer.Option("--num-blocks", "-k", help="K; may be repeated. Default the recipe's.", show_default=False),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="May be repeated. Default the recipe's.", show_default=False)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.", show_default=False)] = None,
    model: ModelOption = None,
    data: DataOption = None,
    data_root: DataRoot = None,
    equal_time: Annotated[
        list[str] | None,
        typer.Option(
            help="One of the methods: also train end-to-end for as many epochs as fit in its time, with and without "
            "checkpointing; may be repeated.",
            show_default=False,
        ),
    ] = None,
    parts: Annotated[int, typer.Option(help="Micro-batches of accumulation; 1 leaves it out.")] = 4,
    rounds: Annotated[int, typer.Option(help="Timed steps of each method.")] = 7,
    keep: Annotated[bool, typer.Option("--keep", help="Keep weights and checkpoints of finished runs.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Rows, costs, table and picture; default runs/compare-RECIPE.", show_default=False),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Run nothing, make table and picture anew.")] = False,
) -> None:
    """Train many methods with equal data, seeds and epochs, and show score against memory, time and FLOPs.

    End-to-end training, checkpointing and accumulation are always among them.

    [bold]localgrad compare cifar10_resnet32 -m dgl -m '[dgl, man_pp]' -k 16 --seed 0 --seed 1 data.limit=20000[/bold]

    A finished run is never run again, a stopped one continues, and several processes may share one --out.
    """
    recipe, overrides = _positional(recipe, overrides)
    from localgrad.bench import compare_command as command

    if recipe is None and not (model and data) and not (table and out):
        raise ConfigError("nothing to compare: name a recipe, a YAML file, or both --model and --data")
    out = out or Path("runs") / f"compare-{Path(recipe or str(data)).stem.replace(':', '-')}"
    if table:
        print(command.report(out))
        return
    base = _settings(recipe, overrides, model__name=model, data__name=data, data__root=data_root, train__epochs=epochs)
    print(
        command.run(
            base,
            out,
            _console(stderr=True),
            method=method or [],
            num_blocks=num_blocks or [],
            seed=seed or [],
            parts=parts,
            equal_time=equal_time or [],
            rounds=rounds,
            keep=keep,
            again="the same command",
        )
    )


def _fail(message: str, code: int) -> NoReturn:
    width = min(100, shutil.get_terminal_size().columns)
    print(textwrap.fill(f"error: {message}", width, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def _one_paragraph() -> Iterator[None]:
    try:
        yield
    except LocalgradError as error:
        _fail(str(error), 130 if type(error).__name__ == "Interrupted" else 2)
    except SystemExit as error:
        if error.code == 130:  # how typer ends on Ctrl-C
            _fail("stopped; what was not checkpointed is lost", 130)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _fail(f"{what}; check the path, its permissions and the space left there", 2)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors of localgrad end as one paragraph and exit code 2, an interruption as 130."""
    with _one_paragraph():
        app(arguments)


__all__ = ["app", "main"]
