"""CamVid: test mIoU of several methods with equal data, seeds, data order and epochs; one row a run, kept in a file.

python bench/camvid.py --rows results/camvid-2026-11-21/rows.jsonl \\
    e2e dgl dgl+man_pp dgl+mlaan infopro e2e+checkpointing

A method is written as on the command line. Rows that the file holds are not run again, so a stopped command continues
where it was. The table is made from the file alone (--table).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from localgrad.config import Config, validate
from localgrad.costs import cost
from localgrad.recipes import override, read_recipe
from localgrad.spec import parse_method
from localgrad.train.experiment import build
from localgrad.train.loop import train
from localgrad.train.meters import evaluate


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--recipe", default="camvid_unet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.NAME=VALUE", help="settings to change")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="train nothing, print the table")
    return parser.parse_args()


def config_of(asked: argparse.Namespace, method: str, seed: int) -> Config:
    settings = override(read_recipe(asked.recipe), ["data.validation=0.0", f"train.seed={seed}", *asked.set])
    return validate(settings | {"method": parse_method(method)}, "bench/camvid.py")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_all(asked: argparse.Namespace) -> None:
    asked.rows.parent.mkdir(parents=True, exist_ok=True)
    for seed in asked.seeds:
        for method in asked.methods:
            key = {"recipe": asked.recipe, "set": asked.set, "method": method, "seed": seed}
            if any(row["run"] == key for row in read(asked.rows)):
                continue
            run = build(config_of(asked, method, seed))
            inputs, targets = next(iter(run.data.train.epoch(0)))
            step = cost(run.network, inputs.contiguous(memory_format=torch.channels_last), targets)
            started = time.process_time()
            train(run, lambda _: None, lambda _: None)
            seconds = time.process_time() - started
            found = evaluate(run.network, run.data.test)
            row = {
                "run": key,
                "metrics": {name: round(100 * value, 2) for name, value in found["metrics"].items()},
                "heads": {name: round(100 * value, 2) for name, value in found["score"].items()},
                "train_loss": round(run.history[-1]["train"]["loss"]["model"], 4),
                "cpu_seconds": round(seconds, 1),
                "activation_bytes": step.activation_bytes,
                "flops": step.flops,
                "torch": torch.__version__,
            }
            with asked.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def print_table(asked: argparse.Namespace) -> None:
    rows = [row for row in read(asked.rows) if row["run"]["method"] in asked.methods]
    first = rows[0]
    print("| method | test mIoU (seeds) | pixels | CPU time | activations | FLOPs |\n|---|---|---|---|---|---|")
    for method in asked.methods:
        own = [row for row in rows if row["run"]["method"] == method]
        if not own:
            continue
        scores = [row["metrics"]["miou"] for row in own]
        pixels = sum(row["metrics"]["pixel_accuracy"] for row in own) / len(own)
        ratios = [
            sum(row[name] for row in own) / len(own) / first[name]
            for name in ("cpu_seconds", "activation_bytes", "flops")
        ]
        print(
            f"| `{method}` | {sum(scores) / len(scores):.1f} ({', '.join(map(str, scores))}) | {pixels:.1f} "
            f"| {ratios[0]:.2f} | {ratios[1]:.2f} | {ratios[2]:.2f} |"
        )


if __name__ == "__main__":
    asked = arguments()
    print_table(asked) if asked.table else train_all(asked)
