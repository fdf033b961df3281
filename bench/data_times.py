"""Seconds per epoch of class folders without training: files decoded in every epoch, and pictures kept in memory.

python bench/data_times.py FOLDER [FOLDER ...] [--rounds 3] [--limit 2000] [--out FILE]

A FOLDER is one for ``localgrad train --data``, or the name of a set. The ways take turns; of each the fastest round
counts. CPU seconds are those of this process and its workers together, and less disturbed by what else runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

import localgrad.data
from localgrad.data.kept import Kept


def epoch(loader: Any, number: int) -> tuple[float, float]:
    """Wall and CPU seconds of an epoch."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    for _ in loader.epoch(number):
        pass
    return time.perf_counter() - wall, sum(os.times()[:4]) - cpu


def levels(loader: Any) -> dict[str, float]:
    """How torchvision's resampling of uint8 tensors, which a GPU could do, differs from the transform of pictures."""
    differing, largest, count = 0, 0, 0
    crop = v2.RandomResizedCrop(224, antialias=True)
    for item in loader.items[:: max(1, len(loader.items) // 100)]:
        picture, _ = loader.read(item)
        torch.manual_seed(item[2])
        one = v2.functional.to_image(crop(picture)).int()
        torch.manual_seed(item[2])
        other = crop(v2.functional.to_image(picture)).int()
        differing += int((one != other).sum())
        largest = max(largest, int((one - other).abs().max()))
        count += one.numel()
    return {"share of values that differ": differing / count, "largest difference": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.names:
        for workers in (0, 2):
            found = localgrad.data.load(name, batch_size=64, workers=workers, limit=options.limit)
            for split in ("train", "test"):
                loader: Any = getattr(found, split)
                again = dataclasses.replace(loader, read=Kept("", loader.read.count, loader.read.make))
                first = epoch(loader, 0)
                while not loader.read.places[loader.order.indices, 1].all():
                    epoch(loader, 0)
                times = [(epoch(again, k), epoch(loader, k)) for k in range(1, options.rounds + 1)]
                before, after = ([min(pair[way][at] for pair in times) for at in (0, 1)] for way in (0, 1))
                kept = int((loader.read.places[:, 1] * loader.read.places[:, 2]).sum()) * 3
                row = {
                    "data": Path(name).name, "split": split, "workers": workers, "images": loader.num_samples,
                    "MiB": kept / 2**20, "first epoch": first, "decoded in every epoch": before, "kept": after,
                }  # fmt: skip
                if split == "train" and not workers:
                    row |= levels(loader)
                rows.append(row)
                print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
