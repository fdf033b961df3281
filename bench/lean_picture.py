"""Accuracy against activations, time and FLOPs of a step: the finalists of docs/lean.md on CIFAR-10.

python bench/lean_picture.py results/lean-2026-11-21 results/lean-2026-11-21/cifar10.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from localgrad.measure.plots import REFERENCES, new_figure, save_figure

FIRST = "{checkpointing: {where: pointwise, first: 1}}"


def spelled_out(depth: int, tail: int, factor: int) -> list[Any]:
    """`lean` as in the rows of the first round, at 16 pixels, where `least` is half of that at 32."""
    return [{"auglocal": {"depth": depth, "tail": tail}}, {"pooled": {"factor": factor, "least": 4, "start": 1}}]


ACCUMULATION = ["e2e", {"accumulation": {"parts": 4}}]
POOLED_BY_4 = [{"lean": {"factor": 4, "least": 4}}]
DEEPER_16 = [{"lean": {"depth": 3, "tail": 7, "factor": 4, "least": 2}}]

# Name, blocks, the spellings of the method in the rows of the runs, method in the costs, colour.
FINALISTS: list[tuple[str, int, list[list[Any]], str, str]] = [
    ("end-to-end", 1, [["e2e"]], "e2e", REFERENCES["end-to-end"]),
    ("checkpointing", 1, [["e2e"]], "e2e+checkpointing", REFERENCES["checkpointing"]),
    ("accumulation x4", 1, [ACCUMULATION], "[e2e, {accumulation: {parts: 4}}]", REFERENCES["accumulation"]),
    ("dgl, 8 blocks", 8, [["dgl"]], "dgl", "#7f8c8d"),
    ("auglocal, 8 blocks", 8, [["auglocal"]], "auglocal", "#8e44ad"),
    ("lean, 8 blocks", 8, [spelled_out(2, 1, 2)], "lean", "#c0392b"),
    (
        "lean(factor=4, least=8), 8 blocks",
        8,
        [spelled_out(2, 1, 4), POOLED_BY_4],
        "[{lean: {factor: 4, least: 8}}]",
        "#e67e22",
    ),
    (
        "the same, first recomputed",
        8,
        [spelled_out(2, 1, 4), POOLED_BY_4],
        f"[{{lean: {{factor: 4, least: 8}}}}, {FIRST}]",
        "#f1c40f",
    ),
    ("dgl+man_pp, 8 blocks, one seed", 8, [["dgl", "man_pp"]], "dgl+man_pp", "#2c3e50"),
    ("dgl, 16 blocks", 16, [["dgl"]], "dgl", "#7f8c8d"),
    ("auglocal, 16 blocks", 16, [["auglocal"]], "auglocal", "#8e44ad"),
    ("lean(tail=5, ...), 16 blocks", 16, [spelled_out(2, 5, 4)], "[{lean: {tail: 5, factor: 4, least: 8}}]", "#c0392b"),
    ("lean(depth=3, tail=7, ...), 16 blocks", 16, [DEEPER_16], "[{lean: {depth: 3, tail: 7, factor: 4}}]", "#e67e22"),
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("results", type=Path, help="with cifar10/rows.jsonl, costs-8.json and costs-16.json")
parser.add_argument("picture", type=Path)
arguments = parser.parse_args()

rows = [json.loads(line) for line in (arguments.results / "cifar10" / "rows.jsonl").read_text().splitlines()]
costs = {blocks: json.loads((arguments.results / f"costs-{blocks}.json").read_text()) for blocks in (8, 16)}
figure, axes = new_figure(3, 5.0)
for name, blocks, spellings, costed, color in FINALISTS:
    found = [
        100 * row["score"]
        for row in rows
        if row["settings"]["method"] in spellings and row["settings"]["blocks"]["num_blocks"] == blocks
    ]
    mean = statistics.mean(found)
    cost = costs[blocks if blocks > 1 else 16][costed]
    for axis, column in zip(axes, ("activations", "time", "FLOPs"), strict=True):
        spread = [[mean - min(found)], [max(found) - mean]]
        marker = {1: "o", 8: "^", 16: "s"}[blocks]
        axis.errorbar(cost[column], mean, yerr=spread, fmt=marker, color=color, markersize=8, capsize=2, label=name)
        axis.set_xlabel(f"{column} of a step, end-to-end = 1")
for axis in axes:
    axis.set_xlim(left=0)
axes[0].set_ylabel("test accuracy, last epoch, %")
axes[0].legend(fontsize=7.5, loc="lower right")
figure.suptitle("ResNet-32, 20,000 images of CIFAR-10 at 16 pixels, 10 epochs; bars span three seeds", fontsize=11)
save_figure(figure, arguments.picture)
