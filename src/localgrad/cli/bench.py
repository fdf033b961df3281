"""`localgrad bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from localgrad.cli.console import new_console
from localgrad.cli.options import Json


def bench(
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
    from localgrad.study import contest_command

    console = new_console(stderr=True)
    found = contest_command.run(
        model, method or ["dgl"], num_blocks or [4], variant or ["fp32"], balance=balance, parts=parts,
        combinations=combinations, batch_size=batch_size, image_size=image_size, channels=channels,
        num_classes=num_classes, device=device, threads=threads, rounds=rounds, seed=seed, picture=picture,
        accuracy=accuracy, timeline=timeline, out=out, progress=lambda what: console.print(what, style="dim"),
    )  # fmt: skip
    print(json.dumps(found.as_dict(), indent=2) if as_json else found)
