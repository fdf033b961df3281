"""How near a local form comes to end-to-end training at 32 pixels, with and without the average of its heads.

    python bench/push.py run --out results/push-2026-11-28 --seed 0 e2e "lean(depth=3, factor=4), 5 blocks"
    python bench/push.py table --out results/push-2026-11-28

ResNet-32 on the first 20,000 images of CIFAR-10, 18,000 of which train and 2,000 validate. ``run`` trains each way that
has no row yet, scores it on both splits, and adds its row to ``rows.jsonl``; several commands may write there. A run
that was broken off goes on at its last whole epoch, which lies under ``runs/``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import localgrad
from localgrad.config import dump, validate
from localgrad.costs import cost
from localgrad.recipes import override, read_recipe
from localgrad.spec import parse_method
from localgrad.study.rows import add_row, read_rows
from localgrad.train.experiment import Experiment, build
from localgrad.train.folder import RunFolder
from localgrad.train.loop import train

FIRST = "{checkpointing: {where: pointwise, first: 1}}"
DEEPER = "{lean: {depth: 3, factor: 4}}"
STEPS = 282  # of an epoch


@dataclass(frozen=True)
class Way:
    """Blocks by bytes, the plug-ins of a method, and the share of the run after which every step is guided."""

    blocks: int
    method: str
    local: float = 1.0


WAYS = {
    "e2e": Way(1, "e2e"),
    "e2e, 4 micro-batches": Way(1, "e2e, {accumulation: {parts: 4}}"),
    "lean(depth=3, factor=4), 5 blocks": Way(5, f"{DEEPER}, {FIRST}"),
    "linear heads, 5 blocks, the second half end to end": Way(5, "{dgl: {head: linear}}", 0.5),
    "lean(depth=3, factor=4), 5 blocks, the second half end to end": Way(5, DEEPER, 0.5),
    "lean(depth=3), 2 blocks, 2 micro-batches": Way(2, "{lean: {depth: 3}}, {accumulation: {parts: 2}}"),
}


def settings_of(way: Way, seed: int, epochs: int, start: int) -> dict[str, Any]:
    """The settings of a run whose steps are guided from ``start`` on, if any are."""
    guided = f", {{pgl: {{every: 1, start: {start}}}}}" if way.local < 1 else ""
    chosen = [
        "data.limit=20000", "data.validation=0.1", "train.batch_size=64", "train.threads=1", "train.channels_last=true",
        f"blocks.num_blocks={way.blocks}", "blocks.balance=bytes", f"train.epochs={epochs}", f"train.seed={seed}",
    ]  # fmt: skip
    return override(read_recipe("cifar10_resnet32"), chosen) | {"method": parse_method(f"[{way.method}{guided}]")}


def built(way: Way, seed: int, epochs: int, start: int) -> Experiment:
    return build(validate(settings_of(way, seed, epochs, start), "bench/push.py"))


def cost_of(way: Way) -> tuple[int, float]:
    """Activation bytes of the dearest step, and FLOPs of the mean one."""
    found = []
    for start in (1, 0)[: 2 if way.local < 1 else 1]:  # step 0 is what is measured
        experiment = built(way, 0, 1, start)
        inputs, targets = next(iter(experiment.data.train.epoch(0)))
        found.append(cost(experiment.network, inputs.contiguous(memory_format=torch.channels_last), targets))
    shares = (way.local, 1 - way.local)[: len(found)]
    mean = sum(share * one.flops for share, one in zip(shares, found, strict=True))
    return max(one.activation_bytes for one in found), mean


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
        bytes_, flops = cost_of(WAYS[way])
        experiment = built(WAYS[way], asked.seed, asked.epochs, int(WAYS[way].local * asked.epochs * STEPS))
        folder = RunFolder(asked.out / "runs" / key)
        folder.claim(resume=folder.holds_run)
        folder.begin(dump(experiment.config))
        folder.open(experiment)
        print(key, "from epoch", experiment.epoch, flush=True)
        train(experiment, lambda _: None, folder.finish_epoch)
        folder.close()
        row = {
            "run": key,
            "way": way,
            "blocks": WAYS[way].blocks,
            "seed": asked.seed,
            "epochs": asked.epochs,
            "seconds": round(sum(one["seconds"] for one in experiment.history), 1),
            "activation_bytes": bytes_,
            "flops": flops,
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
