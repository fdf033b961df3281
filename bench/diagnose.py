"""Probe accuracy, gradient cosine with end-to-end training and similarity to another run, block by block.

localgrad compare cifar10_resnet32 -m dgl -k 16 --keep --out runs/mine
python bench/diagnose.py --reference runs/mine/runs/KEY_OF_E2E runs/mine/runs/KEY_OF_DGL ...

The key of a run is ``run`` in its row of rows.jsonl. Training images are augmented as in training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from localgrad.spec import method_name
from localgrad.study.diagnosis import diagnose
from localgrad.train.finished import read_config

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
