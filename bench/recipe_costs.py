"""What every recipe costs, measured; written beside the recipes, where `localgrad list recipes` finds it.

python bench/recipe_costs.py            # all of them, about 20 minutes on one core
python bench/recipe_costs.py man/ dgl/  # those that begin so; the rest of the file is kept

One training step on 2 random images of the data set's size, on the CPU, beside end-to-end training of the same network.
Recipes with equal networks, cuts and methods are measured once. FLOPs are per image; a run takes that times images,
times epochs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from typing import Any

import torch

from localgrad.bench.cost import Cost, cost
from localgrad.config import COSTS, Config, read_recipe, recipe_costs, recipes, validate
from localgrad.data.sources import SOURCES
from localgrad.train.experiment import build_network, build_task

IMAGES = {"digits": 1437, "cifar10": 50_000, "svhn": 73_257, "stl10": 5_000, "imagefolder": 1_281_167}  # to train on
BATCH = 2


def entry(config: Config) -> dict[str, Any]:
    """One recipe in numbers: FLOPs per image, bytes of 2 images, PFLOPs of the whole run."""
    source = SOURCES[config.data.name]
    size = (source.shape, len(source.classes) or 1000)
    kept = {key: value for key, value in dataclasses.asdict(config).items() if key in ("model", "blocks", "method")}
    num_blocks, found = measured(*size, json.dumps(kept))
    _, reference = measured(*size, json.dumps(kept | {"method": ["e2e"], "blocks": {"num_blocks": 1}}))
    images = round(min(IMAGES[config.data.name], config.data.limit or 10**9) * (1 - config.data.validation))
    return {
        "blocks": num_blocks,
        "flops": found.flops // BATCH,
        "e2e_flops": reference.flops // BATCH,
        "activation_bytes": found.activation_bytes,
        "e2e_activation_bytes": reference.activation_bytes,
        "parameters": found.parameters,
        "auxiliary_parameters": found.auxiliary_parameters,
        "twin_parameters": found.twin_parameters,
        "images": images,
        "pflops": float(f"{found.flops / BATCH * images * config.train.epochs / 1e15:.4g}"),
    }


@functools.cache
def measured(shape: tuple[int, int, int], classes: int, settings: str) -> tuple[int, Cost]:
    """The number of blocks and the cost of a step of ``settings`` (JSON) on images of ``shape``."""
    config = validate(json.loads(settings), "recipe")
    channels = shape[0]
    task = build_task(config, classes, (0.5,) * channels, (0.25,) * channels)
    network = build_network(config, task, shape, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, *shape, generator=generator)
    return len(network.blocks), cost(network, inputs, torch.randint(classes, (BATCH,), generator=generator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("begins", nargs="*", help="only recipes whose names begin so")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    costs = {name: costs for name, costs in recipe_costs().items() if name in recipes()}
    for name in recipes():
        if not asked.begins or name.startswith(tuple(asked.begins)):
            started = time.perf_counter()
            costs[name] = entry(validate(read_recipe(name), name))
            print(f"{name}: {costs[name]} ({time.perf_counter() - started:.1f} s)", flush=True)
            rows = [f"{json.dumps(key)}: {json.dumps(costs[key])}" for key in sorted(costs)]
            COSTS.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
