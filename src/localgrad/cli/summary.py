"""`localgrad summary`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from localgrad.cli.console import new_console, new_table
from localgrad.cli.options import (
    BlocksOption,
    Json,
    MethodOption,
    ModelOption,
    Overrides,
    Recipe,
    positional,
    settings_of,
)
from localgrad.errors import ConfigError

NUM_CLASSES, BATCH_SIZE = 10, 16  # of the measured step


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
    as_json: Json = False,
) -> None:
    """Show each block: where it begins, parameters, FLOPs and activations, and totals as ratios to end-to-end.

    [bold]localgrad summary --model torchvision:resnet50 --method dgl --num-blocks 4 --image-size 64[/bold]
    """
    recipe, overrides = positional(recipe, overrides)
    if recipe is None and model is None:
        raise ConfigError(
            "nothing to summarise: name a recipe or a --model, for instance --model resnet32 --num-blocks 8"
        )
    settings = settings_of(recipe, overrides, method=method, blocks__num_blocks=num_blocks, model__name=model)
    from localgrad.data.sources import SOURCES
    from localgrad.study.summary import summarize

    known = SOURCES.get(settings.data.name if recipe is not None else "")
    sides = settings.data.crop_size or settings.data.image_size or (known.shape[1] if known else 32)
    if image_size is not None:
        sides = image_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    channels = known.shape[0] if known else 3
    if min(height, width) < 1:
        raise ConfigError(f"--image-size {height}: it is at least 1")
    result = summarize(settings, (channels, height, width), NUM_CLASSES, BATCH_SIZE)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    title = f"{result['model']}, {result['method']}, batch of {BATCH_SIZE} images {channels}x{height}x{width}"
    table = new_table("block", "begins at", "features", "parameters", "MFLOPs", "MiB saved", left=3)
    for row in result["blocks"]:
        parameters = row["head_parameters"] + row["twin_parameters"]
        own = [f"{row['parameters']:,}", f"{row['flops'] / 1e6:,.1f}", f"{row['saved_bytes'] / 2**20:.2f}"]
        heads = [f"{parameters:,}", f"{row['head_flops'] / 1e6:,.1f}", f"{row['head_saved_bytes'] / 2**20:.2f}"]
        if parameters:
            own = [f"{a}\n+ {b}" for a, b in zip(own, heads, strict=True)]
        table.add_row(str(row["block"]), row["begins_at"], "x".join(map(str, row["features"])), *own)
    console = new_console()
    console.print(title, style="bold")
    console.print(table)
    console.print("+ what the auxiliary networks on the block's output add", style="dim")
    total, e2e, again = result["total"], result["e2e"], result["checkpointing"]

    def of_checkpointing(key: str) -> str:
        return "not possible" if again is None else f"{again[key] / e2e[key]:.2f}x"

    console.print(
        f"One training step, {result['method']} against end-to-end: activations "
        f"{total['activation_bytes'] / 2**20:.2f} of {e2e['activation_bytes'] / 2**20:.2f} MiB "
        f"({total['activation_bytes'] / e2e['activation_bytes']:.2f}x), with checkpointing at the same boundaries "
        f"{of_checkpointing('activation_bytes')}; FLOPs {total['flops'] / e2e['flops']:.2f}x (checkpointing "
        f"{of_checkpointing('flops')}); "
        f"training parameters {(total['parameters'] + total['auxiliary_parameters']) / e2e['parameters']:.2f}x.",
    )
