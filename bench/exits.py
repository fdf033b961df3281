"""Accuracy against compute of the exits of a trained network: calibrated on validation images, read on test images.

localgrad train cifar10_resnet32 --model resnet20 --num-blocks 4 --epochs 6 data.validation=0.1 train.threads=1 \
    --run-dir runs/exits
python bench/exits.py runs/exits --out results/exits-2026-11-28

Writes exits.json and exits.md; scripts/figures.py draws the picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localgrad.measure.tables import markdown
from localgrad.train.experiment import load_data
from localgrad.train.export import network_of
from localgrad.train.predict import load_trained


@torch.no_grad()
def seconds(answer: Callable[[Tensor], Any], batches: list[Tensor]) -> float:
    """Processor time of all batches."""
    begin = time.process_time()
    for inputs in batches:
        answer(inputs)
    return time.process_time() - begin


def timed(ways: dict[str, Callable[[Tensor], Any]], batches: list[Tensor], rounds: int) -> dict[str, float]:
    """Median seconds of each way, in turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(seconds(way, batches))
    return {name: statistics.median(each) for name, each in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="of localgrad train, with a validation split")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="timed passes over the first 2,000 test images")
    arguments = parser.parse_args()

    trained = load_trained(arguments.run, "cpu")
    data = load_data(trained.config, torch.device("cpu"))
    assert data.validation is not None
    exits = network_of(arguments.run, trained).exits()
    validation, test = list(data.validation.epoch(0)), list(data.test.epoch(0))
    curve = exits.curve(validation, test)
    calibrated = {}
    images = list(torch.cat([inputs for inputs, _ in test])[:2000].split(len(test[0][0])))
    ways: dict[str, Callable[[Tensor], Any]] = {"the model": trained.model}
    for points in (0.0, 1.0):
        one = network_of(arguments.run, trained).exits()
        calibrated[points] = one.calibrate(validation, points)
        ways[f"exits, {points:g} points"] = one
    times = timed(ways, images, arguments.rounds)
    alone = timed(ways, [image[None] for image in images[0][:200]], arguments.rounds)

    arguments.out.mkdir(parents=True, exist_ok=True)
    heads = [["head", "test accuracy", "FLOPs of blocks and head", "share of the model's"]]
    for boundary, score, flops in zip(curve.boundaries, curve.heads, curve.flops, strict=True):
        name = "the model" if boundary == curve.boundaries[-1] else f"prefix({boundary})"
        heads.append([name, f"{score:.2%}", f"{flops / 1e6:.2f} M", f"{flops / curve.flops[-1]:.3f}"])
    clock = [["way", f"batches of {len(images[0])}", "share", "one by one", "share"]]
    for name, spent in times.items():
        base, base_alone = times["the model"], alone["the model"]
        clock.append(
            [
                name,
                f"{1e3 * spent / sum(map(len, images)):.3f} ms",
                f"{spent / base:.2f}",
                f"{1e3 * alone[name] / 200:.2f} ms",
                f"{alone[name] / base_alone:.2f}",
            ]
        )
    tables = [curve.table(), *("\n".join(markdown(rows, (0,))) for rows in (heads, clock))]
    (arguments.out / "exits.md").write_text("\n\n".join(tables) + "\n")
    found = {
        "curve": dataclasses.asdict(curve),
        "calibration": {str(points): dataclasses.asdict(outcome) for points, outcome in calibrated.items()},
        "temperature": one.temperature.tolist(),
        "block_flops": exits.block_flops,
        "head_flops": exits.head_flops,
        "processor_seconds": {"2,000 images": times, "200 images one by one": alone},
        "torch": torch.__version__,
    }
    (arguments.out / "exits.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n\n".join(tables))
