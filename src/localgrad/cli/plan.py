"""`localgrad plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from localgrad.cli.console import new_console
from localgrad.cli.options import Json
from localgrad.errors import ConfigError


def plan(
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
    console = new_console()
    console.print(str(found), soft_wrap=True)
    if found.code:
        console.print(f"\n{found.code}", soft_wrap=True)
    if picture is not None:
        console.print(f"\nPicture: {picture}", soft_wrap=True)
