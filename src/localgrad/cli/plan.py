"""`localgrad plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from localgrad.cli.console import new_console
from localgrad.cli.options import Json
from localgrad.errors import ConfigError

PLANNED = ("classification", "segmentation", "regression", "multilabel")


def plan(
    model: Annotated[str, typer.Argument(help="resnet32, timm:NAME, torchvision:NAME, or MODULE:FUNCTION.")],
    batch_size: Annotated[int, typer.Option(help="Images in a step.")],
    memory: Annotated[str | None, typer.Option(help="What there is, such as 8GiB.", show_default=False)] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Sides of the square images; default 32 or 224.", show_default=False)
    ] = None,
    task: Annotated[
        str, typer.Option(help="What the model is trained to do, and its outputs: segmentation:21, regression:1.")
    ] = "classification",
    method: Annotated[
        str, typer.Option("--method", "-m", help="Of local learning: dgl+man, or YAML: '[{dgl: {head: linear}}]'.")
    ] = "dgl",
    optimizer: Annotated[Literal["sgd", "adamw"], typer.Option(help="SGD has momentum.")] = "sgd",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="bf16 uses autocast.")] = "fp32",
    rates: Annotated[
        str | None,
        typer.Option(
            help="TFLOP/s and GB/s of the device that will train, and GB/s of its link to the host: 30,500,25; default "
            "measured here.",
            show_default=False,
        ),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw memory against time here.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Predict, without training, what fits: peak memory and step time of every way to train a model.

    [bold]localgrad plan torchvision:resnet152 --batch-size 64 --memory 8GiB[/bold]
    """
    from localgrad import models
    from localgrad.planning import plan

    size, num_classes = models.made_for(model)
    found = plan(
        model, batch_size=batch_size, memory=memory, image_size=image_size or size, task=_task(task, num_classes),
        method=method, optimizer=optimizer, precision=precision, rates=None if rates is None else _rates(rates),
    )  # fmt: skip
    if picture is not None:
        found.picture(picture)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    console = new_console()
    console.print(str(found), soft_wrap=True)
    if found.code:
        console.print(f"\n{found.code}", soft_wrap=True)
    if picture is not None:
        console.print(f"\nPicture: {picture}", soft_wrap=True)


def _task(text: str, num_classes: int) -> Any:
    from localgrad import tasks

    name, colon, number = text.partition(":")
    if name not in PLANNED or not (number.isdecimal() or not (colon or number)):
        raise ConfigError(f"--task {text}: write one of {', '.join(PLANNED)}, with its outputs: {PLANNED[1]}:21")
    return getattr(tasks, name)(int(number) if number else num_classes)


def _rates(text: str) -> Any:
    from localgrad.planning import Rates

    try:
        tflops, bandwidth, *rest = map(float, text.split(","))
        (link,) = rest or [Rates.link / 1e9]
    except ValueError as error:
        raise ConfigError(
            f"--rates {text} is not two or three numbers; write TFLOP/s and GB/s, --rates 30,500, and GB/s of the link"
        ) from error
    return Rates(tflops * 1e12, bandwidth * 1e9, link=link * 1e9)
