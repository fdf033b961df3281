"""`localgrad bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from localgrad.cli.console import new_console
from localgrad.errors import ConfigError


def bench(
    model: Annotated[str, typer.Argument(help="resnet32, timm:NAME, torchvision:NAME, or MODULE:FUNCTION.")],
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
    balance: Annotated[
        Literal["count", "bytes"], typer.Option(help="Balance blocks by number of units or by bytes.")
    ] = "count",
    combinations: Annotated[
        bool, typer.Option(help="Also per-block steps, recomputation inside blocks and micro-batches of each method.")
    ] = True,
    image_size: Annotated[
        int | None, typer.Option(help="Sides of the square images; default 32 or 224.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of each way.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for bench.json, pareto.png (memory, time) and timeline.png.", show_default=False),
    ] = None,
) -> None:
    """Measure training steps of a model by many ways, in turn: memory, time, FLOPs, and which way is worth it.

    End-to-end training, checkpointing and accumulation are always among them.

    [bold]localgrad bench resnet32 --batch-size 64 -m dgl -k 4 -k 16[/bold]
    """
    import torch

    from localgrad import models, tasks
    from localgrad.spec import parse_method
    from localgrad.study.contest import contest
    from localgrad.study.contest_plots import pareto_picture, timeline_picture
    from localgrad.study.ways import standard_ways
    from localgrad.train.experiment import device_of

    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}; name a folder that can be written") from error
    torch.set_num_threads(1)
    size, num_classes = models.made_for(model)
    wanted = variant or ["fp32"]
    ways = standard_ways(
        tasks.classification(num_classes, mean=(0.5,) * 3, std=(0.25,) * 3),
        [parse_method(text) for text in method or ["dgl"]],
        num_blocks or [4],
        variants=["fp32", *(name for name in dict.fromkeys(wanted) if name != "fp32")],
        combinations=combinations,
    )
    if "fp32" not in wanted:  # but for the reference, which is plain float32 whatever else is asked for
        ways = [way for way in ways if way is ways[0] or way.variant != "fp32"]
    console = new_console(stderr=True)
    found = contest(
        model, ways, batch_size=batch_size, image_size=image_size or size, num_classes=num_classes, balance=balance,
        device=device_of("auto"), rounds=rounds, timeline=out is not None,
        progress=lambda what: console.print(what, style="dim"),
    )  # fmt: skip
    if out is not None:
        (out / "bench.json").write_text(json.dumps(found.as_dict(), indent=1) + "\n", encoding="utf-8")
        pareto_picture(found, out / "pareto.png")
        timeline_picture(found, out / "timeline.png")
    print(found)
