"""A network trained on CIFAR-10 adapted to Fashion-MNIST: local forms beside end to end, LoRA and frozen features.

    python bench/fine_tuning.py run --out results/fine-tuning-2026-11-28 --seed 0
    python bench/fine_tuning.py report --out results/fine-tuning-2026-11-28

``run`` trains ResNet-32 end to end on the first 20,000 images of CIFAR-10 at 16x16 pixels for 10 epochs, keeps the
weights in ``--weights``, and adapts them by each way that has no row yet, with each rate, on 2,000 images of
Fashion-MNIST. The rate is chosen on 1,000 other images of its training split. It can be stopped and started again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import localgrad
from localgrad import methods as m
from localgrad.costs import cost
from localgrad.method import Method
from localgrad.study.rows import add_row, read_rows

SIDE, BATCH, IMAGES, EPOCHS, RATES = 16, 64, 2000, 10, (0.01, 0.05, 0.2)
TASK = localgrad.tasks.classification(10)


@dataclass(frozen=True)
class Way:
    """A method and its blocks; what trains: everything, heads alone in the first epoch, LoRA or the classifier."""

    method: Method
    blocks: int = 1
    trains: str = "all"
    pretrained: bool = True


WAYS: dict[str, Way] = {
    "end to end": Way(m.e2e(TASK)),
    "end to end, from scratch": Way(m.e2e(TASK), pretrained=False),
    "frozen features": Way(m.e2e(TASK), trains="classifier"),
    "LoRA, rank 4": Way(m.e2e(TASK), trains="lora"),
    "dgl, K=2": Way(m.dgl(TASK), 2),
    "dgl, K=4": Way(m.dgl(TASK), 4),
    "dgl, K=4, last 2 joined": Way(m.tail(m.dgl(TASK), blocks=2), 4),
    "lean, K=2": Way(m.lean(TASK), 2),
    "lean, K=4": Way(m.lean(TASK), 4),
    "lean, K=4, heads first": Way(m.lean(TASK), 4, "heads first"),
    "lean, K=4, last 2 joined": Way(m.lean(TASK, tail=2), 4),
}


def pretrained(path: Path) -> dict[str, Tensor]:
    """Weights of a ResNet-32 that was trained on CIFAR-10, from ``path`` or trained now."""
    if not path.is_file():
        data = localgrad.data.load("cifar10", batch_size=BATCH, image_size=SIDE, limit=20_000, validation=0.0)
        torch.manual_seed(0)
        model = localgrad.models.resnet32()
        fit(model, data.train.epoch, len(data.train), 10, 0.1, model)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return load_file(path)


def network_of(way: Way, weights: dict[str, Tensor], seed: int) -> localgrad.LocalNetwork:
    """The network that a way trains."""
    torch.manual_seed(seed)
    model: nn.Module = localgrad.models.resnet32()
    if way.pretrained:
        model.load_state_dict(
            {name: value for name, value in weights.items() if not name.startswith("fc.")}, strict=False
        )
    if way.trains == "lora":
        from peft import LoraConfig, get_peft_model

        names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, modules_to_save=["fc"]))
    if way.trains == "classifier":
        model.requires_grad_(False)
        model.fc.requires_grad_(True)
    return localgrad.localize(
        model, way.method, localgrad.cuts.by_bytes(way.blocks), example=torch.zeros(2, 3, SIDE, SIDE)
    )


def fit(
    network: Any,
    batches: Callable[[int], Iterator[Any]],
    steps: int,
    epochs: int,
    rate: float,
    module: nn.Module,
) -> float:
    """SGD with a cosine; processor seconds."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    start, step = time.process_time(), 0
    for epoch in range(epochs):
        for images, targets in batches(epoch):
            inputs = images.expand(-1, 3, -1, -1)
            if isinstance(network, localgrad.LocalNetwork):
                localgrad.backward(network, inputs, targets, step)
            else:
                nn.functional.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
    return time.process_time() - start


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any) -> float:
    """Percent of a split."""
    model.eval()
    right = sum(int((model(x.expand(-1, 3, -1, -1)).argmax(1) == y).sum()) for x, y in loader.epoch(0))
    model.train()
    return 100 * right / loader.num_samples


def adapt(way: Way, weights: dict[str, Tensor], rate: float, seed: int) -> dict[str, Any]:
    """A row of one way with one rate."""
    data = localgrad.data.load(
        "fashion_mnist", batch_size=BATCH, eval_batch_size=500, image_size=SIDE, limit=IMAGES + 1000,
        validation=1000 / (IMAGES + 1000), seed=seed, drop_last=True,
    )  # fmt: skip
    assert data.validation is not None
    network = network_of(way, weights, seed)
    inputs, targets = next(data.train.epoch(0))
    found = cost(network, inputs.expand(-1, 3, -1, -1), targets)
    seconds, epochs = 0.0, EPOCHS
    if way.trains == "heads first":  # features stay as they were, statistics of their norms too
        blocks = copy.deepcopy(network.model.state_dict())
        network.model.requires_grad_(False)
        network.model.fc.requires_grad_(True)
        seconds += fit(network, data.train.epoch, len(data.train), 1, rate, network)
        classifier = {name: value for name, value in network.model.state_dict().items() if name.startswith("fc.")}
        network.model.load_state_dict({**blocks, **classifier})
        network.model.requires_grad_(True)
        epochs -= 1
    if way.trains == "classifier":
        network.model.eval()
    seconds += fit(network, data.train.epoch, len(data.train), epochs, rate, network)
    return {
        "validation": accuracy(network.model, data.validation),
        "test": accuracy(network.model, data.test),
        "seconds": round(seconds, 1),
        "activation_bytes": found.activation_bytes,
        "flops": found.flops,
        "trained": sum(p.numel() for p in network.model.parameters() if p.requires_grad),
    }


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    weights = pretrained(Path(arguments.weights))
    path = Path(arguments.out) / "runs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, way in WAYS.items():
        for rate in RATES:
            key = f"{name}, rate {rate}, seed {arguments.seed}"
            if key not in read_rows(path, "key"):
                row = {"key": key, "way": name, "rate": rate, "seed": arguments.seed}
                add_row(path, row | adapt(way, weights, rate, arguments.seed))
                print(read_rows(path, "key")[key], flush=True)


def report(arguments: argparse.Namespace) -> None:
    """A table: of each seed the rate that was best on the validation images, and what it has on the test images."""
    rows = list(read_rows(Path(arguments.out) / "runs.jsonl", "key").values())
    whole = next(row for row in rows if row["way"] == "end to end")
    print("| way | test accuracy | rates | activations of end to end | FLOPs of end to end | parameters trained |")
    print("|---|---:|---|---:|---:|---:|")
    for name in WAYS:
        seeds = sorted({row["seed"] for row in rows if row["way"] == name})
        best = [
            max((r for r in rows if (r["way"], r["seed"]) == (name, s)), key=lambda r: r["validation"]) for s in seeds
        ]
        if best:
            each = ", ".join(f"{row['test']:.1f}" for row in best)
            rates = ", ".join(str(row["rate"]) for row in best)
            cells = [
                f"{statistics.mean(row['test'] for row in best):.1f} ({each})", rates,
                f"{best[0]['activation_bytes'] / whole['activation_bytes']:.2f}",
                f"{best[0]['flops'] / whole['flops']:.2f}", f"{best[0]['trained']:,}",
            ]  # fmt: skip
            print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, do in (("run", run), ("report", report)):
        command = commands.add_parser(name)
        command.add_argument("--out", required=True)
        command.add_argument("--weights", default="runs/fine-tuning.safetensors")
        command.add_argument("--seed", type=int, default=0)
        command.set_defaults(do=do)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
