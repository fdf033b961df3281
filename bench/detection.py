"""COCO's mAP of several methods with equal data, seeds, data order and steps; one row a run, kept in a file.

    python bench/detection.py --rows results/detection-2026-11-21/rows.jsonl --recipe coco128_retinanet_resnet50 \\
        --split train e2e dgl+man_pp
    python bench/detection.py --rows results/detection-2026-11-21/rows.jsonl --recipe bccd_retinanet_resnet18 \\
        e2e e2e+checkpointing dgl dgl+man_pp

A method is written as on the command line. Rows that the file holds are not run again, so a stopped command continues
where it was, and several commands may write to one file. --table prints a table of the file and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from localgrad.config import validate
from localgrad.recipes import override, read_recipe
from localgrad.spec import parse_method
from localgrad.train.experiment import build
from localgrad.train.loop import train
from localgrad.train.meters import evaluate


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--split", choices=("train", "test"), default="test", help="what is scored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.NAME=VALUE", help="settings to change")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="train nothing, print the table")
    return parser.parse_args()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(asked: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    return {"recipe": asked.recipe, "set": asked.set, "split": asked.split, "method": method, "seed": seed}


def train_one(asked: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    settings = override(read_recipe(asked.recipe), [f"train.seed={seed}", *asked.set])
    run = build(validate(settings | {"method": parse_method(method)}, "bench/detection.py"))
    started = time.process_time()

    def report(state: Any) -> None:
        last = state.history[-1]["train"]
        print(method, seed, state.epoch, json.dumps(last), flush=True)

    train(run, lambda _: None, report)
    seconds = time.process_time() - started
    found = evaluate(run.network, run.data.train if asked.split == "train" else run.data.test)
    return {
        "run": key_of(asked, method, seed),
        "images": run.data.train.num_samples,
        "steps": run.step,
        "metrics": {name: round(value, 4) for name, value in found["metrics"].items() if not name.startswith("ap/")},
        "heads_map": {name: round(value, 4) for name, value in found["score"].items()},
        "train_loss": {name: round(value, 4) for name, value in run.history[-1]["train"]["loss"].items()},
        "cpu_seconds": round(seconds, 1),
        "auxiliary_parameters": sum(p.numel() for p in run.network.auxiliary.parameters() if p.requires_grad),
        "torch": torch.__version__,
    }


def train_all(asked: argparse.Namespace) -> None:
    asked.rows.parent.mkdir(parents=True, exist_ok=True)
    for seed in asked.seeds:
        for method in asked.methods:
            if any(row["run"] == key_of(asked, method, seed) for row in read(asked.rows)):
                continue
            row = train_one(asked, method, seed)
            with asked.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def print_table(asked: argparse.Namespace) -> None:
    wanted = [key_of(asked, method, seed) for method in asked.methods for seed in asked.seeds]
    rows = [row for row in read(asked.rows) if row["run"] in wanted]
    rows.sort(key=lambda row: wanted.index(row["run"]))
    print(f"| method | seed | {asked.split} mAP@50 | mAP | CPU time |\n|---|---|---|---|---|")
    for row in rows:
        figures = [100 * row["metrics"][name] for name in ("map_50", "map")]
        ratio = row["cpu_seconds"] / rows[0]["cpu_seconds"]
        print(
            f"| `{row['run']['method']}` | {row['run']['seed']} | {figures[0]:.1f} | {figures[1]:.1f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    asked = arguments()
    print_table(asked) if asked.table else train_all(asked)
