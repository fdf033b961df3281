"""Byte-balanced cuts against the best there are: every choice of K - 1 cut points, its step run without data.

python bench/balance_check.py                           # K = 2 and 3, about an hour on one core
python bench/balance_check.py --only vit --blocks 2 3 4
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from math import comb
from pathlib import Path

import torch

from localgrad import methods, models, tasks
from localgrad.partition import by_count
from localgrad.planning import Planner, Rates

MODELS = [("torchvision:resnet50", 8), ("torchvision:resnet101", 4), ("timm:vit_small_patch16_224", 8)]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default="")
parser.add_argument("--blocks", type=int, nargs="+", default=[2, 3])
parser.add_argument("--out", type=Path, help="append one JSON line for each row")
arguments = parser.parse_args()

task = tasks.classification(1000)
method = methods.dgl(task, head="linear")
print(f"torch {torch.__version__}; 224 px, dgl with linear heads; MiB of activations and gradients, the batch included")
print("| model | batch | K | optimizer steps | choices | best | by bytes | ratio | by count | ratio | best cuts |")
print("|---|---|---|---|---|---|---|---|---|---|---|")
for name, batch in (one for one in MODELS if arguments.only in one[0]):
    model = models.create(name, num_classes=1000, image_size=224)
    planner = Planner(model, (3, 224, 224), batch, "fp32", Rates(1.0, 1.0))
    names = [cut.name for cut in planner.partition.cuts]
    for num_blocks in arguments.blocks:
        peaks = {}
        for cuts in combinations(names, num_blocks - 1):
            step = planner.step(planner.network(method, cuts), method)
            peaks[cuts] = {"at the end": sum(step.peak), "by block": sum(step.per_block)}
        equal = tuple(cut.name for cut in by_count(planner.partition, num_blocks))
        for when, held in (("at the end", "earlier"), ("by block", "own")):
            chosen = tuple(cut.name for cut in planner.cuts(num_blocks, method, held))
            best = min(peaks, key=lambda cuts: peaks[cuts][when])
            least, ours, count = (peaks[cuts][when] for cuts in (best, chosen, equal))
            sizes = f"{least / 2**20:.1f} | {ours / 2**20:.1f} | {ours / least:.3f} | {count / 2**20:.1f}"
            sizes += f" | {count / least:.3f}"
            choices = comb(len(names), num_blocks - 1)
            print(f"| {name} | {batch} | {num_blocks} | {when} | {choices} | {sizes} | {', '.join(best)} |", flush=True)
            if arguments.out:
                row = {"model": name, "batch": batch, "blocks": num_blocks, "optimizer steps": when, "best": least,
                       "by_bytes": ours, "by_count": count, "best_cuts": best, "chosen": chosen}  # fmt: skip
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
