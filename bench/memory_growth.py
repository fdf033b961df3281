"""How the peak of a step grows with the batch and with the depth: local learning against what is exact.

Bytes of live tensors above weights and optimizer state (SGD without momentum has none), gradients included. They are
exact, so one run tells. ``dgl`` with linear heads steps each block as soon as its micro-batches have passed it.
Prints two tables.

    python bench/memory_growth.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import timm
import torch
from torch import nn

import localgrad
from localgrad import methods
from localgrad.measure.memory import LiveBytes
from localgrad.method import Method

TASK = localgrad.tasks.classification(10)
Step = Callable[[torch.Tensor, torch.Tensor], None]


def vit(depth: int) -> nn.Module:
    """ViT-S/16 at 224 pixels, ``depth`` layers."""
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224", num_classes=10, depth=depth)


def local(depth: int, method: Method, per_block: bool) -> tuple[localgrad.LocalNetwork, Step]:
    """A step of a method with a block for each layer, and one for the patches."""
    model, example = vit(depth), torch.randn(2, 3, 224, 224)
    blocks = 1 if not method.terms else depth + 1
    network = localgrad.localize(model, method, blocks, example=example).train()
    groups = [network.block_parameters(k) for k in range(blocks)]
    if not per_block:
        groups = [[p for group in groups for p in group]]
    optimizers = [torch.optim.SGD(group, 0.1) for group in groups]

    def move(block: int) -> None:
        optimizers[block].step()
        optimizers[block].zero_grad(set_to_none=True)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        for _, loss in localgrad.local_losses(network, inputs, targets, on_block_done=move if per_block else None):
            loss.backward()
        if not per_block:
            move(0)

    return network, step


def checkpointed(depth: int, parts: int, in_backward: bool) -> tuple[nn.Module, Step]:
    """Exact gradients: every layer checkpointed, micro-batches, or the optimizer in the backward pass."""
    model = vit(depth).train()
    model.set_grad_checkpointing()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if in_backward:
        single = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

        def move(parameter: torch.Tensor) -> None:
            single[parameter].step()
            single[parameter].zero_grad(set_to_none=True)

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(move)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            (nn.functional.cross_entropy(model(x), y) / parts).backward()
        if not in_backward:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return model, step


def peak(made: tuple[nn.Module, Step], batch: int) -> int:
    """The most that is alive in the second step."""
    model, step = made
    inputs, targets = torch.randn(batch, 3, 224, 224), torch.randint(10, (batch,))
    step(inputs, targets)
    with LiveBytes(p for p in model.parameters()) as tracker:
        step(inputs, targets)
    return tracker.peak


def ways(depth: int, batch: int) -> Iterator[tuple[str, tuple[nn.Module, Step]]]:
    """Each way to train, by name."""
    dgl, parts = methods.dgl(TASK, head="linear"), max(4, batch // 4)
    yield "end to end", local(depth, methods.e2e(TASK), False)
    yield f"checkpointing, accumulation x{parts}", checkpointed(depth, parts, False)
    yield "checkpointing, optimizer in the backward pass", checkpointed(depth, 1, True)
    yield "dgl, a step per block", local(depth, dgl, True)
    yield f"dgl, a step per block, accumulation x{parts}", local(depth, methods.accumulation(dgl, parts=parts), True)


def table(title: str, cells: list[tuple[str, int, int]]) -> None:
    """Print MiB, and the share of end-to-end training's."""
    found: dict[str, dict[str, int]] = {}
    for column, depth, batch in cells:
        for name, made in ways(depth, batch):
            row = name.replace(f" x{max(4, batch // 4)}", " of 4 images" if batch > 16 else " x4")
            found.setdefault(row.split(" x4")[0].split(" of 4")[0], {})[column] = peak(made, batch)
    whole = found["end to end"]
    print(f"\n{title}\n")
    print(f"| way | {' | '.join(column for column, *_ in cells)} |")
    print(f"|---|{'---|' * len(cells)}")
    for row, values in found.items():
        shown = (f"{values[c] / 2**20:.1f} MiB, {values[c] / whole[c]:.3f}" for c, *_ in cells)
        print(f"| {row} | {' | '.join(shown)} |", flush=True)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64])
parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24])
arguments = parser.parse_args()
table("12 layers", [(f"batch {batch}", 12, batch) for batch in arguments.batches])
table("batch 8", [(f"{depth} layers", depth, 8) for depth in arguments.depths])
