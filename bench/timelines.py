"""What is alive during a step of three ways to train: end to end, checkpointing every unit, and the leanest of `dgl`.

python bench/timelines.py results/timelines-2026-11-28    # resnet32.json, vit_small.json, resnet101.json

One tracked step of each way, thinned to at most 400 moments: of each stretch the one at which most was alive.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from localgrad import models, tasks
from localgrad.cutting import auxiliary_bytes
from localgrad.partition import Partition, by_bytes
from localgrad.partition.choose import unit_storages
from localgrad.spec import parse_method
from localgrad.study.contest import contest
from localgrad.study.contest_report import thinned
from localgrad.study.ways import REFERENCE, SGD, UNITS, standard_ways

# Model, batch, image size, method and blocks of local learning.
LINEAR = "[{dgl: {head: linear}}]"
STEPS = {
    "resnet32": ("resnet32", 64, 32, "dgl", 16),
    "vit_small": ("timm:vit_small_patch16_224", 8, 224, LINEAR, 13),
    "resnet101": ("torchvision:resnet101", 4, 224, LINEAR, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(exist_ok=True)
    for name, (model, batch, size, method, blocks) in STEPS.items():
        if arguments.only not in (None, name):
            continue
        _, classes = models.made_for(model)
        task = tasks.classification(classes, mean=(0.5,) * 3, std=(0.25,) * 3)
        ways = standard_ways(task, [parse_method(method)], [blocks])
        usual = [way for way in ways if (way.optimizer, way.variant) == (SGD, "fp32")]
        exact = [way for way in usual if way.name in (REFERENCE, UNITS)]
        local = next(way for way in ways if way.name.endswith("per-block step"))
        partition = Partition(models.create(model, num_classes=classes), torch.randn(2, 3, size, size))
        auxiliary = auxiliary_bytes(local.method, partition, blocks)
        cuts = by_bytes(partition, blocks, auxiliary, unit_storages(partition), gradients="own", share=2 / batch)
        ways = [*exact, replace(local, cuts=tuple(cut.name for cut in cuts))]
        found = contest(
            model, ways, batch_size=batch, image_size=size, num_classes=classes, rounds=1,
            timeline=True, progress=lambda what: print(what, file=sys.stderr, flush=True),
        )  # fmt: skip
        rows = [{**asdict(row), "timeline": thinned(row.timeline)} for row in found.rows]
        (arguments.out / f"{name}.json").write_text(json.dumps({**asdict(found), "rows": rows}) + "\n")
        print(name, [(row.name, round(row.total_bytes / 2**20, 1)) for row in found.rows], len(found.rows[0].timeline))


if __name__ == "__main__":
    main()
