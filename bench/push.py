"""How near a local form comes to end-to-end training at 32 pixels, with and without the average of its heads.

    python bench/push.py run --out results/push-2026-11-28 --seed 0 "e2e" "lean, 5 blocks"
    python bench/push.py table --out results/push-2026-11-28

ResNet-32 on the first 20,000 images of CIFAR-10, 18,000 of which train and 2,000 validate. ``run`` trains each way that
has no row yet, scores it on both splits, and adds its row to ``rows.jsonl``; several commands may write there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import localgrad
from localgrad.config import validate
from localgrad.costs import cost
from localgrad.recipes import override, read_recipe
from localgrad.spec import parse_method
from localgrad.study.rows import add_row, read_rows
from localgrad.train.experiment import build
from localgrad.train.loop import train

FIRST = "{checkpointing: {where: pointwise, first: 1}}"
DEEPER = "{lean: {depth: 3, factor: 4}}"
# Name: blocks by bytes, method.
WAYS = {
    "e2e": (1, "e2e"),
    "lean, 5 blocks": (5, f"[lean, {FIRST}]"),
    "lean(depth=3, factor=4), 5 blocks": (5, f"[{DEEPER}, {FIRST}]"),
    "lean(depth=4, factor=4), 5 blocks": (5, f"[{{lean: {{depth: 4, factor: 4}}}}, {FIRST}]"),
    "lean(depth=3, factor=4), 4 blocks": (4, f"[{DEEPER}, {FIRST}]"),
    "dgl, 4 blocks": (4, "dgl"),
}


def settings_of(way: str, seed: int, epochs: int) -> dict[str, Any]:
    blocks, method = WAYS[way]
    chosen = [
        "data.limit=20000", "data.validation=0.1", "train.batch_size=64", "train.threads=1", "train.channels_last=true",
        f"blocks.num_blocks={blocks}", "blocks.balance=bytes", f"train.epochs={epochs}", f"train.seed={seed}",
    ]  # fmt: skip
    return override(read_recipe("cifar10_resnet32"), chosen) | {"method": parse_method(method)}


@torch.no_grad()
def scores(network: localgrad.LocalNetwork, split: Any) -> dict[str, float]:
    """Accuracy in percent of each head, of the model, and of the mean of all their probabilities (``average``)."""
    network.eval()
    right: dict[str, int] = {}
    count = 0
    for inputs, targets in split.epoch(0):
        mean = torch.zeros(())
        for span, term, logits in localgrad.local_outputs(network, inputs, scored_only=True):
            assert isinstance(logits, Tensor)
            mean = mean + logits.softmax(1)
            name = "model" if term is None else f"block {span.stop}"
            right[name] = right.get(name, 0) + int((logits.argmax(1) == targets).sum())
        right["average"] = right.get("average", 0) + int((mean.argmax(1) == targets).sum())
        count += len(targets)
    network.train()
    return {name: round(100 * n / count, 2) for name, n in right.items()}


def run(asked: argparse.Namespace) -> None:
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "rows.jsonl"
    for way in asked.ways or WAYS:
        key = f"{way}, {asked.epochs} epochs, seed {asked.seed}"
        if key in read_rows(path, "run"):
            continue
        experiment = build(validate(settings_of(way, asked.seed, asked.epochs), "bench/push.py"))
        inputs, targets = next(iter(experiment.data.train.epoch(0)))
        step = cost(experiment.network, inputs.contiguous(memory_format=torch.channels_last), targets)
        print(key, flush=True)
        started = time.process_time()
        train(experiment, lambda _: None, lambda state: print(state.epoch, flush=True))
        row = {
            "run": key,
            "way": way,
            "blocks": WAYS[way][0],
            "seed": asked.seed,
            "epochs": asked.epochs,
            "cpu_seconds": round(time.process_time() - started, 1),
            "activation_bytes": step.activation_bytes,
            "flops": step.flops,
            "validation": scores(experiment.network, experiment.data.validation),
            "test": scores(experiment.network, experiment.data.test),
            "torch": torch.__version__,
        }
        add_row(path, row)
        print(json.dumps(row), flush=True)


def table(asked: argparse.Namespace) -> None:
    rows = list(read_rows(asked.out / "rows.jsonl", "run").values())
    print("| way | epochs | model (seeds) | average of heads | validation: model, average | activations | FLOPs |")
    print("|---|---:|---|---|---|---:|---:|")
    for epochs in sorted({row["epochs"] for row in rows}):
        for way in WAYS:
            own = [row for row in rows if row["way"] == way and row["epochs"] == epochs]
            whole = [row for row in rows if row["way"] == "e2e" and row["epochs"] == epochs]
            if not own or not whole:
                continue
            cells = [way, str(epochs)]
            for name in ("model", "average"):
                each = [row["test"][name] for row in own]
                cells.append(f"{statistics.mean(each):.1f} ({', '.join(f'{score:.1f}' for score in each)})")
            cells.append(
                ", ".join(f"{statistics.mean(r['validation'][n] for r in own):.1f}" for n in ("model", "average"))
            )
            cells += [f"{own[0][name] / whole[0][name]:.3f}" for name in ("activation_bytes", "flops")]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("ways", nargs="*", help="default all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    asked = parser.parse_intermixed_args()
    {"run": run, "table": table}[asked.command](asked)
