"""Test accuracy with features rounded between ranks, every block on a rank of its own; one row a run, kept in a file.

python bench/wire_accuracy.py --data digits --model resnet8 --epochs 15 --seeds 0 1 2 3 4 --rows rows.jsonl

One process stands for all ranks: each block's inputs are rounded as `block_parallel(wire=...)` would send them, which
gives the same weights (tests/distributed/test_compression.py). Rows that the file holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from localgrad.config import validate
from localgrad.distributed.compression import Wire, compressed, restored
from localgrad.train.experiment import build
from localgrad.train.loop import train
from localgrad.train.meters import evaluate


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", default="dgl")
    parser.add_argument("--num-blocks", type=int, default=4)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--limit", type=int, default=None, help="training images")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    return parser.parse_args()


def rounding(wire: Wire) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that gives the module a block begins with what would have arrived."""
    return lambda _, features: tuple(restored(compressed(f, wire), f.dtype) for f in features)


def row(asked: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """One run: accuracy of the model with rounded features, as ranks evaluate it, and with exact ones afterwards."""
    config = validate(
        {
            "method": [key["method"]],
            "model": {"name": key["model"]},
            "data": {"name": key["data"], "validation": 0.0, "limit": key["limit"]},
            "blocks": {"num_blocks": key["num_blocks"]},
            "optim": {"lr": 0.1, "weight_decay": 5e-4, "warmup_epochs": 1},
            "train": {"epochs": key["epochs"], "batch_size": 64, "seed": key["seed"], "threads": 1},
        },
        "bench/wire_accuracy.py",
    )
    run = build(config)
    begins = [run.network.model.get_submodule(cut.name) for cut in run.network.cuts]
    hooks = [module.register_forward_pre_hook(rounding(key["wire"])) for module in begins]
    train(run, lambda _: None, lambda _: None)
    found = {}
    for name in ("rounded", "exact"):
        found[name] = 100 * evaluate(run.network, run.data.test)["score"]["model"]
        for hook in hooks:
            hook.remove()
    return key | found


def main() -> None:
    asked = arguments()
    known = [json.loads(line) for line in asked.rows.read_text().splitlines()] if asked.rows.exists() else []
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in asked.seeds:
        for wire in get_args(Wire):
            key = {n: v for n, v in vars(asked).items() if n not in ("seeds", "rows")} | {"seed": seed, "wire": wire}
            found = next((r for r in known if r.items() >= key.items()), None)
            if found is None:
                found = row(asked, key)
                with asked.rows.open("a") as file:
                    file.write(json.dumps(found) + "\n")
            rows.setdefault(wire, []).append(found)
            print(json.dumps(found), flush=True)
    print("| wire | test accuracy, % | exact features at test | difference to `same`, per seed |\n|---|---|---|---|")
    for wire, of in rows.items():
        columns = [[r[name] for r in of] for name in ("rounded", "exact")]
        means = [f"{statistics.mean(c):.2f} ± {statistics.stdev(c):.2f}" for c in columns]
        apart = ", ".join(f"{a['rounded'] - b['rounded']:+.2f}" for a, b in zip(of, rows["same"], strict=True))
        print(f"| `{wire}` | {means[0]} | {means[1]} | {'' if wire == 'same' else apart} |")


if __name__ == "__main__":
    main()
