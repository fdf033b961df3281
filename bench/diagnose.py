"""Probe accuracy, gradient cosine with end-to-end training and similarity to another run, block by block.

localgrad compare cifar10_resnet32 -m dgl -k 16 --keep --out runs/mine
python bench/diagnose.py --reference runs/mine/runs/KEY_OF_E2E runs/mine/runs/KEY_OF_DGL ...

The key of a run is ``run`` in its row of rows.jsonl. Training images are augmented as in training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localgrad.spec import method_name
from localgrad.study.diagnosis import features_of, gradient_cosines, linear_cka, linear_probe
from localgrad.train.experiment import Experiment, build
from localgrad.train.finished import read_config
from localgrad.train.folder import RunFolder


def finished(folder: Path) -> Experiment:
    """The run that ``localgrad compare --keep`` or ``localgrad train`` left in ``folder``, as it ended.

    Raises:
        CheckpointError: no finished run there.
    """
    experiment = build(read_config(folder))
    RunFolder(folder).restore(experiment)
    return experiment


def diagnose(folder: Path, reference: Path | None, samples: int) -> dict[str, list[float]]:
    """Linear probe, gradient cosine and, beside a ``reference`` run of the same model, CKA behind each block.

    Args:
        folder: of a finished run of a classifier.
        reference: of another one, such as end-to-end training.
        samples: training images to fit probes on, and test images to score them.
    """
    run = finished(folder)
    x, y = _samples(run.data.train, samples)
    u, v = _samples(run.data.test, samples)
    behind = [list(features_of(run.network, part)) for part in (x, u)]
    found = {"probe": [linear_probe(a, y, b, v) for a, b in zip(*behind, strict=True)]}
    found["gradient cosine"] = gradient_cosines(run.network, x[:256], y[:256])
    if reference is not None:
        other = finished(reference).network.model.state_dict()
        run.network.model.load_state_dict(other)
        found["CKA"] = [linear_cka(a, b) for a, b in zip(behind[1], features_of(run.network, u), strict=True)]
    return found


def _samples(loader: Any, count: int) -> tuple[Tensor, Tensor]:
    inputs, targets = [], []
    for x, y in loader.epoch(0):
        inputs.append(x)
        targets.append(y)
        if sum(map(len, inputs)) >= count:
            break
    return torch.cat(inputs)[:count], torch.cat(targets)[:count]


def main() -> None:
    """One table for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--reference", type=Path, help="a run of the same model, end-to-end training say")
    parser.add_argument("--samples", type=int, default=2000)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    for folder in arguments.runs:
        config = read_config(folder)
        found = diagnose(folder, arguments.reference, arguments.samples)
        print(f"\n{method_name(config.method)}, {config.blocks.num_blocks} blocks, seed {config.train.seed}\n")
        print("| after block | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
        for block, values in enumerate(zip(*found.values(), strict=True), start=1):
            print(f"| {block} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


if __name__ == "__main__":
    main()
