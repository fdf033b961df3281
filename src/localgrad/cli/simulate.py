"""`localgrad simulate`."""

from __future__ import annotations

from typing import Annotated

import typer

from localgrad.cli.console import new_console, new_table

LATENCY = 1e-3  # of a link, seconds


def simulate(
    model: Annotated[str, typer.Argument(help="resnet32, timm:NAME, torchvision:NAME, or MODULE:FUNCTION.")],
    ranks: Annotated[int, typer.Option(help="Devices like this one.")] = 4,
    num_blocks: Annotated[int, typer.Option("--num-blocks", "-k", help="Blocks to cut the model into.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Images of one replica in a step.")] = 32,
    bandwidth: Annotated[float, typer.Option(help="Of a link, Mbit/s.")] = 1000.0,
) -> None:
    """Forecast how fast several devices would train, and by which layout: blocks are timed here, links are assumed.

    Compares block-parallel local learning (DGL heads) with GPipe, 1F1B and data parallelism.
    """
    import torch

    from localgrad import methods, models, tasks
    from localgrad.distributed import simulate as simulator
    from localgrad.localization import localize

    torch.set_num_threads(1)
    image_size, num_classes = models.made_for(model)
    built = models.create(model, num_classes=num_classes, in_channels=3, image_size=image_size)
    x, y = torch.randn(batch_size, 3, image_size, image_size), torch.arange(batch_size) % num_classes
    network = localize(built, methods.dgl(tasks.classification(num_classes)), num_blocks, example=x[:2])
    costs = simulator.measured(network.train(), x, y)
    link = simulator.LinkSpeed(bandwidth * 1e6 / 8, LATENCY)
    found = simulator.layouts(costs, link, batch_size, ranks, micro_batches=8)
    console = new_console()
    console.print(f"{model} in {num_blocks} blocks, batch {batch_size}, one CPU thread", style="bold")
    table = new_table("block", "forward", "heads and\nbackward", "sent", "parameters")
    for index, cost in enumerate(costs):
        table.add_row(
            str(index + 1), f"{cost.forward * 1e3:.1f} ms", f"{cost.rest * 1e3:.1f} ms",
            f"{cost.features / 2**20:.2f} MiB", f"{cost.parameters / 2**20:.2f} MiB",
        )  # fmt: skip
    console.print(table)
    table = new_table("layout", "blocks on", "samples/s", "step", "waiting", "MiB a step,\nbusiest link", left=2)
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
