"""Test accuracy of several methods with equal data, seeds, data order and epochs; one row a run, kept in a file.

python bench/accuracy.py --data cifar10 --num-blocks 8 16 --seeds 0 1 --rows results/rows.jsonl e2e dgl dgl+man

A method is written as on the command line, or as YAML for options: '[dgl, {pgl: {every: 4}}]'. Rows that the file holds
are not run again, so a stopped command continues where it was. The table is made from the file alone (--table).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from localgrad.bench.cost import cost, step_seconds
from localgrad.config import Config, MethodSpec, parse_method, validate
from localgrad.train.experiment import Experiment, build
from localgrad.train.loop import train


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--num-blocks", type=int, nargs="+", default=[16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--limit", type=int, default=None, help="training images")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="train nothing, print the table with fresh step costs")
    return parser.parse_args()


def spec_of(text: str) -> MethodSpec:
    spec: MethodSpec = yaml.safe_load(text) if text.startswith("[") else parse_method(text)
    return spec


def config_of(asked: argparse.Namespace, text: str, num_blocks: int, seed: int) -> Config:
    return validate(
        {
            "method": spec_of(text),
            "model": {"name": asked.model},
            "data": {
                "name": asked.data, "validation": 0.0, "limit": asked.limit, "image_size": asked.image_size
            },
            "blocks": {"num_blocks": num_blocks},
            "optim": {"lr": asked.lr, "weight_decay": 5e-4, "schedule": "cosine"},
            "train": {
                "epochs": asked.epochs, "batch_size": asked.batch_size, "seed": seed, "threads": 1,
                "channels_last": True,
            },
        },
        "bench/accuracy.py",
    )  # fmt: skip


@torch.no_grad()
def test_accuracy(run: Experiment) -> float:
    """Of the plain model, in percent; no head runs."""
    model, task = run.network.model.eval(), run.network.method.task
    scores = [task.score(model(x.contiguous(memory_format=torch.channels_last)), y) for x, y in run.data.test.epoch(0)]
    return round(100 * torch.cat(scores).mean().item(), 2)


def commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def runs(asked: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Config]]:
    """What identifies each run, and its configuration; every method of a seed before the next seed."""
    for seed in asked.seeds:
        for num_blocks in asked.num_blocks:
            for text in asked.methods:
                # End-to-end training does not depend on where the network is cut.
                blocks = 1 if spec_of(text) == ["e2e"] else num_blocks
                key = {
                    "data": asked.data, "limit": asked.limit, "image_size": asked.image_size, "model": asked.model,
                    "num_blocks": blocks, "method": text, "seed": seed, "epochs": asked.epochs,
                    "batch_size": asked.batch_size, "lr": asked.lr,
                }  # fmt: skip
                yield key, config_of(asked, text, blocks, seed)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_all(asked: argparse.Namespace) -> None:
    for key, config in runs(asked):
        if any(row["run"] == key for row in read(asked.rows)):
            continue
        run = build(config)
        started = time.process_time()
        train(run, lambda _: None, lambda _: None)
        row = {
            "run": key,
            "test": test_accuracy(run),
            "train_loss": round(run.history[-1]["train"]["loss"]["model"], 4),
            "cpu_seconds": round(time.process_time() - started, 1),
            "commit": commit(),
            "torch": torch.__version__,
        }
        with asked.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def print_table(asked: argparse.Namespace) -> None:
    """Mean test accuracy over seeds with its spread, beside the cost of a step, contestants in turn."""
    rows = {json.dumps(row["run"]): row for row in read(asked.rows)}
    print(f"| {asked.data} | blocks | test accuracy, last epoch (seeds) | activations | step time | parameters |")
    print("|---|---|---|---|---|---|")
    for num_blocks in asked.num_blocks:
        networks, seconds = [], []
        inputs = targets = torch.empty(0)
        for text in asked.methods:
            experiment = build(config_of(asked, text, num_blocks, asked.seeds[0]))
            networks.append(experiment.network)
            inputs, targets = next(iter(experiment.data.train.epoch(0)))
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        seconds = step_seconds(networks, inputs, targets)
        costs = [cost(network, inputs, targets) for network in networks]
        for text, one, taken in zip(asked.methods, costs, seconds, strict=True):
            keys = [key for key, _ in runs(asked) if key["method"] == text and key["num_blocks"] in (num_blocks, 1)]
            names = dict.fromkeys(map(json.dumps, keys))
            found = [rows[name]["test"] for name in names if name in rows]
            accuracy = f"{statistics.mean(found):.1f} ({', '.join(f'{f:.1f}' for f in found)})" if found else "not run"
            print(
                f"| {text} | {num_blocks} | {accuracy} | {one.activation_bytes / costs[0].activation_bytes:.2f} "
                f"| {taken / seconds[0]:.2f} | {(one.parameters + one.auxiliary_parameters) / one.parameters:.1f} |"
            )


if __name__ == "__main__":
    asked = arguments()
    print_table(asked) if asked.table else train_all(asked)
