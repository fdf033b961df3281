"""What every recipe costs, measured; written beside the recipes, where `localgrad list recipes` finds it.

python bench/recipe_costs.py            # all of them, about 20 minutes on one core
python bench/recipe_costs.py man/ dgl/  # those that begin so; the rest of the file is kept

One training step on 2 random images of the data set's size, or sequences of tokens, on the CPU, beside end-to-end
training of the same network. Recipes with equal networks, cuts and methods are measured once. FLOPs are per image; a
run takes that times images, times epochs. Of text a run is a million tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from typing import Any

import torch

from localgrad.config import Config, validate
from localgrad.costs import Cost, cost, random_targets
from localgrad.data import kind_of
from localgrad.data.sources import SOURCES
from localgrad.recipes import COSTS, read_recipe, recipe_costs, recipes
from localgrad.train.experiment import build_network, build_task

IMAGES = {"digits": 1437, "cifar10": 50_000, "svhn": 73_257, "stl10": 5_000, "imagefolder": 1_281_167}  # to train on
IMAGES |= {"camvid": 367, "cityscapes": 2975, "coco": 118_287, "coco128": 128, "bccd": 205}
CLASSES = {"camvid": 11, "cityscapes": 19, "coco": 80, "coco128": 80, "bccd": 3}
BATCH = 2


def entry(config: Config) -> dict[str, Any]:
    """One recipe in numbers: FLOPs per image, bytes of 2 images, PFLOPs of the whole run."""
    kind = kind_of(config.data.name)
    if kind == "language_model":
        return text_entry(config)
    if kind != "classification":
        return dense_entry(config)
    source = SOURCES[config.data.name]
    size = (source.shape, len(source.classes) or 1000)
    kept = {key: value for key, value in dataclasses.asdict(config).items() if key in ("model", "blocks", "method")}
    num_blocks, found = measured(*size, json.dumps(kept))
    _, reference = measured(*size, json.dumps(kept | {"method": ["e2e"], "blocks": {"num_blocks": 1}}))
    return row(config, num_blocks, found, reference)


def dense_entry(config: Config) -> dict[str, Any]:
    """The same of a recipe with masks or boxes, more than 100,000 pixels measured at a quarter of their sides."""
    sides = config.data.crop_size or config.data.image_size
    if isinstance(sides, int):  # the shorter side of photographs, most of them 4:3
        sides = (sides, sides * 4 // 3)
    assert sides is not None
    small = tuple(side // 4 for side in sides) if math.prod(sides) > 100_000 else sides
    ratio = math.prod(sides) / math.prod(small)
    kept = {"data": {"name": config.data.name}, "task": config.task}
    kept |= {key: value for key, value in dataclasses.asdict(config).items() if key in ("model", "blocks", "method")}
    found, reference = (
        measured((3, *small), CLASSES[config.data.name], json.dumps(kept | changes))
        for changes in ({}, {"method": ["e2e"], "blocks": {"num_blocks": 1}})
    )
    scaled = (
        dataclasses.replace(c, flops=round(c.flops * ratio), activation_bytes=round(c.activation_bytes * ratio))
        for _, c in (found, reference)
    )
    return row(config, found[0], *scaled)


def text_entry(config: Config) -> dict[str, Any]:
    """The same of a recipe for text, for a million tokens of it."""
    vocabulary = 256 if config.data.tokenizer == "bytes" else config.data.tokenizer
    assert isinstance(vocabulary, int)
    kept = {"data": {"name": config.data.name}, "task": config.task}
    kept |= {key: value for key, value in dataclasses.asdict(config).items() if key in ("model", "blocks", "method")}
    found, reference = (
        measured((config.data.context,), vocabulary, json.dumps(kept | changes))
        for changes in ({}, {"method": ["e2e"], "blocks": {"num_blocks": 1}})
    )
    return row(config, found[0], found[1], reference[1])


def row(config: Config, num_blocks: int, found: Cost, reference: Cost) -> dict[str, Any]:
    held_out = 0.0 if config.data.name in ("camvid", "bccd") else config.data.validation  # they have a split for it
    known = IMAGES.get(config.data.name, 10**6 // config.data.context)
    images = round(min(known, config.data.limit or 10**9) * (1 - held_out))
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
def measured(shape: tuple[int, ...], classes: int, settings: str) -> tuple[int, Cost]:
    """The number of blocks and the cost of a step of ``settings`` (JSON) on images of ``shape``."""
    config = validate(json.loads(settings), "recipe")
    channels = shape[0]
    kind = kind_of(config.data.name)
    task = build_task(config, classes, (0.5,) * channels, (0.25,) * channels, kind)
    network = build_network(config, task, shape, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    if kind == "language_model":
        tokens = torch.randint(classes, (BATCH, *shape), generator=generator)
        return network.num_blocks, cost(network, tokens, tokens)
    inputs = torch.randn(BATCH, *shape, generator=generator)
    return network.num_blocks, cost(network, inputs, random_targets(kind, classes, inputs, generator))


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
