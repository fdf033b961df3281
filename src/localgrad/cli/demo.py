"""`localgrad demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from localgrad.cli.console import new_console, new_table
from localgrad.cli.options import settings_of

NEXT = (
    "localgrad plan torchvision:resnet50 --batch-size 256 --memory 8GiB",
    "localgrad bench resnet32 --batch-size 64 -m dgl -k 4 --out runs/bench",
    "localgrad train --model torchvision:vit_b_16 --data FOLDER -m dgl -k 12 optim.name=adamw optim.lr=1e-3",
)


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Where to write; default runs/demo-TIME.", show_default=False)
    ] = None,
) -> None:
    """Train a small transformer end to end and by local learning, and show what a step of each way takes.

    [bold]localgrad demo[/bold]

    A minute on one core. Checkpointing, micro-batches and one block on the device are beside them.
    """
    from localgrad.spec import described
    from localgrad.study.demo import BATCH, PICTURE
    from localgrad.study.demo import demo as study

    console, out = new_console(), out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    config = settings_of("demo", [])
    lines = study(config, out, console)
    first = lines[0].row
    table = new_table("", "acti-\nvations", "memory\nof a step", "", "time", "test\naccuracy")
    for line in lines:
        row, memory = line.row, line.row.memory or 0
        table.add_row(
            row.name,
            f"{(row.activation_bytes or 0) / 2**20:.1f} MiB",
            f"{memory / 2**20:.1f} MiB",
            f"{memory / (first.memory or 1):.2f}x",
            f"{row.time_ratio:.2f}x",
            f"{line.score:.1%}" if line.trained else "=",
        )
    console.print(
        f"\nA step of {BATCH} images by {config.model.name} with AdamW. Local: {described(config.method)}"
        f"\nin {config.blocks.num_blocks} blocks that step one by one. "
        f"Accuracy is that of runs in steps of {config.train.batch_size}.",
        style="bold",
    )
    console.print(table)
    console.print(
        "Memory: weights, gradients, optimizer state and activations at the peak, counted tensor by tensor.\n"
        "=: not trained; the weights are those of end-to-end, or of local, up to rounding.\n"
        "One block: the others' weights and state wait on the host; here both are this machine's memory.",
        style="dim",
    )
    console.print(f"Picture: {out / PICTURE}\n\nNext:", soft_wrap=True)
    for command in NEXT:
        console.print(f"  {command}", soft_wrap=True)
