"""The ways that matter for ResNet-50 and ResNet-101 at 224 pixels, whose steps are too long for `localgrad bench`.

python bench/pareto.py resnet101 results/bench-2026-11-21    # batch 4; or resnet50; writes .json and .md
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from localgrad import methods, models, tasks
from localgrad.cutting import auxiliary_bytes
from localgrad.partition import Partition, by_bytes
from localgrad.partition.choose import unit_storages
from localgrad.study.contest import contest
from localgrad.study.ways import REFERENCE, UNITS, Way

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", choices=("resnet50", "resnet101"))
parser.add_argument("out", type=Path)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--only", choices=("local",), help="only local learning and the reference")
arguments = parser.parse_args()

torch.set_num_threads(1)
task = tasks.classification(1000)
e2e = methods.e2e(task)
local = methods.dgl(task, head="linear")
model = models.create(f"torchvision:{arguments.model}", num_classes=1000)
partition = Partition(model, torch.randn(2, 3, 224, 224))
saved = unit_storages(partition)


def local_way(num_blocks: int, held: Literal["own", "none"] = "own") -> Way:
    """Balanced by activations and the gradients a block has by itself, as it steps alone; or by activations only."""
    auxiliary = auxiliary_bytes(local, partition, num_blocks)
    cuts = by_bytes(partition, num_blocks, auxiliary, saved, gradients=held, share=2 / arguments.batch_size)
    name = f"dgl(head=linear) K={num_blocks}{' by activations' * (held == 'none')}, per-block step"
    return Way(name, "local", local, num_blocks, per_block=True, cuts=tuple(cut.name for cut in cuts))


four, eight = local_way(4), local_way(8)
ways = [
    Way(REFERENCE, REFERENCE, e2e),
    Way(UNITS, "checkpointing", methods.checkpointing(e2e), None),
    Way("accumulation x4", "accumulation", methods.accumulation(e2e)),
    Way(f"{UNITS}, x4", "checkpointing", methods.accumulation(methods.checkpointing(e2e)), None),
    four,
    eight,
    local_way(4, "none"),
    local_way(8, "none"),
    *(
        replace(way, name=f"{way.name}, pointwise recomputed", method=methods.checkpointing(local, where="pointwise"))
        for way in (local_way(4, "none"), local_way(8, "none"))
    ),
    replace(eight, name=f"{eight.name}, checkpointing inside", inside=True),
]
if arguments.only:
    ways = [way for way in ways if way.kind in (REFERENCE, "local") and not way.inside]
found = contest(
    model,
    ways,
    batch_size=arguments.batch_size,
    rounds=arguments.rounds,
    progress=lambda what: print(what, file=sys.stderr, flush=True),
)
found = replace(found, model=f"torchvision:{arguments.model}")
arguments.out.mkdir(exist_ok=True)
(arguments.out / f"{arguments.model}.json").write_text(json.dumps(found.as_dict(), indent=1) + "\n")
(arguments.out / f"{arguments.model}.md").write_text(f"{found}\n")
