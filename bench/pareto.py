"""The ways that matter for ResNet-50 and ResNet-101 at 224 pixels, whose steps are too long for `localgrad bench`.

python bench/pareto.py resnet101 results/bench-2026-11-21    # batch 4; or resnet50; writes .json, .md and two pictures
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from localgrad import methods, tasks
from localgrad.bench.contest import REFERENCE, UNITS, Way, contest
from localgrad.bench.contest_plots import pareto_picture, timeline_picture

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", choices=("resnet50", "resnet101"))
parser.add_argument("out", type=Path)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--rounds", type=int, default=2)
arguments = parser.parse_args()

torch.set_num_threads(1)
task = tasks.classification(1000)
e2e = methods.e2e(task)
local = methods.dgl(task, head="linear")
four = Way("dgl(head=linear) K=4, per-block step", "local", local, 4, per_block=True)
eight = replace(four, name="dgl(head=linear) K=8, per-block step", num_blocks=8)
ways = [
    Way(REFERENCE, REFERENCE, e2e),
    Way(UNITS, "checkpointing", methods.checkpointing(e2e), None),
    Way("accumulation x4", "accumulation", methods.accumulation(e2e)),
    Way(f"{UNITS}, x4", "checkpointing", methods.accumulation(methods.checkpointing(e2e)), None),
    four,
    eight,
    replace(eight, name=f"{eight.name}, checkpointing inside", inside=True),
]
found = contest(
    f"torchvision:{arguments.model}",
    ways,
    batch_size=arguments.batch_size,
    balance="bytes",
    rounds=arguments.rounds,
    timeline=True,
    progress=lambda what: print(what, file=sys.stderr, flush=True),
)
arguments.out.mkdir(exist_ok=True)
(arguments.out / f"{arguments.model}.json").write_text(json.dumps(found.as_dict(), indent=1) + "\n")
(arguments.out / f"{arguments.model}.md").write_text(f"{found}\n")
pareto_picture(found, arguments.out / f"{arguments.model}.png")
timeline_picture(found, arguments.out / f"{arguments.model}-timeline.png")
