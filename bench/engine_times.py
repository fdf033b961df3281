"""What a step costs with this engine and with the traced one of 4d59f19: time in alternating rounds, and bytes.

python bench/engine_times.py OLD/src        # OLD: a worktree of 4d59f19; about fifteen minutes on one core

Every round is a process of its own for each engine, one after the other, so that a machine that slows down slows both.
Times are medians of steps on random images, forward and backward; bytes are the live tensors of one step above weights,
gradients included, as a share of end-to-end training's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import localgrad
from localgrad.costs import cost, step_seconds

TASK = localgrad.tasks.classification(10)
DGL = localgrad.methods.dgl(TASK)
MLAAN = localgrad.methods.mlaan(localgrad.methods.dgl(TASK, head="linear"))


def vit() -> nn.Module:
    return timm.create_model("vit_small_patch16_224", num_classes=10)


def resnet101() -> nn.Module:
    return timm.create_model("resnet101", num_classes=10)


def resnet32() -> nn.Module:
    return localgrad.models.resnet32(num_classes=10)


# Network, pixels, batch, method, blocks, how they are chosen, steps timed in a round.
TIMED: dict[str, tuple[Any, ...]] = {
    "ResNet-32, 64, `dgl` 16 blocks": (resnet32, 32, 64, DGL, 16, "count", 9),
    "ResNet-32, 64, `mlaan` 8 blocks": (resnet32, 32, 64, MLAAN, 8, "count", 9),
    "ViT-S/16, 4, `dgl` 13 blocks": (vit, 224, 4, DGL, 13, "count", 5),
    "ResNet-32, 2, `dgl` 16 blocks": (resnet32, 32, 2, DGL, 16, "count", 41),
}
WEIGHED: dict[str, tuple[Any, ...]] = {
    "ResNet-32, 64, `dgl` 16 blocks": (resnet32, 32, 64, DGL, 16, "count"),
    "ResNet-101, 16, `dgl` 4 blocks by bytes": (resnet101, 224, 16, DGL, 4, "bytes"),
    "ViT-S/16, 16, `dgl` 4 blocks by bytes": (vit, 224, 16, DGL, 4, "bytes"),
}


def cut(model: nn.Module, method: Any, blocks: int, balance: str, example: torch.Tensor, old: bool) -> Any:
    """``localize`` in the words of either engine."""
    if old:
        localize: Any = localgrad.localize
        return localize(model, method, num_blocks=blocks, balance=balance, example=example)
    cutting = localgrad.cuts.by_bytes(blocks) if balance == "bytes" else localgrad.cuts.by_count(blocks)
    return localgrad.localize(model, method, cutting, example=example)


def data(pixels: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 3, pixels, pixels), torch.randint(10, (batch,))


def seconds(old: bool) -> dict[str, float]:
    """Median seconds of a step, by network."""
    found = {}
    for name, (build, pixels, batch, method, blocks, balance, rounds) in TIMED.items():
        inputs, targets = data(pixels, batch)
        network = cut(build(), method, blocks, balance, inputs[:2], old)
        (found[name],) = step_seconds([network], inputs, targets, rounds=rounds)
    return found


def shares(old: bool) -> dict[str, float]:
    """Bytes of a step against end-to-end training's, by network."""
    found = {}
    for name, (build, pixels, batch, method, blocks, balance) in WEIGHED.items():
        inputs, targets = data(pixels, batch)
        local, whole = (
            cost(cut(build(), m, k, how, inputs, old), inputs, targets).total_bytes
            for m, k, how in ((method, blocks, balance), (localgrad.methods.e2e(TASK), 1, "count"))
        )
        found[name] = local / whole
    return found


def run(what: str, source: Path | None) -> dict[str, float]:
    """``seconds`` or ``shares`` in a process of its own, with the engine under ``source`` or the one installed."""
    words = [sys.executable, __file__, "--measure", what] + (["--old"] if source else [])
    environment = {**os.environ, "PYTHONPATH": str(source)} if source else None
    told = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(told.splitlines()[-1]))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", type=Path, nargs="?", help="src of the traced engine's worktree")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--measure", choices=("seconds", "shares"), help="only this, with this engine, as JSON")
parser.add_argument("--old", action="store_true", help="localize takes num_blocks= and balance=")
arguments = parser.parse_args()
torch.set_num_threads(1)
if arguments.measure:
    print(json.dumps({"seconds": seconds, "shares": shares}[arguments.measure](arguments.old)))
    sys.exit()
if arguments.source is None or not (arguments.source / "localgrad").is_dir():
    parser.error("name the src folder of a worktree of 4d59f19")
rounds = [(run("seconds", arguments.source), run("seconds", None)) for _ in range(arguments.rounds)]
print("| model, batch, method | traced engine, ms | own forward, ms | ratio of medians |\n|---|---|---|---|")
for name in TIMED:
    old, new = ([1000 * turn[engine][name] for turn in rounds] for engine in (0, 1))
    ratio = statistics.median(new) / statistics.median(old)
    print(f"| {name} | {', '.join(f'{v:.1f}' for v in old)} | {', '.join(f'{v:.1f}' for v in new)} | {ratio:.3f} |")
before, after = run("shares", arguments.source), run("shares", None)
print("\n| model, batch, method | traced engine | own forward |\n|---|---|---|")
for name in WEIGHED:
    print(f"| {name} | {before[name]:.4f} | {after[name]:.4f} |")
