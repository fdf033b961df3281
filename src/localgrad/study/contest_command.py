"""What ``localgrad bench`` does with its options."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from localgrad import tasks
from localgrad.errors import ConfigError
from localgrad.study.contest import Balance, Contest, contest, read_methods, standard_ways
from localgrad.study.contest_plots import pareto_picture, read_accuracies, timeline_picture
from localgrad.train.experiment import device_of


def run(
    model: str,
    method: Sequence[str],
    num_blocks: Sequence[int],
    variant: Sequence[str],
    *,
    balance: Balance,
    parts: int,
    combinations: bool,
    batch_size: int,
    image_size: int,
    channels: int,
    num_classes: int,
    device: str,
    threads: int,
    rounds: int,
    seed: int,
    picture: Path | None,
    accuracy: Path | None,
    timeline: Path | None,
    out: Path | None,
    progress: Callable[[str], None],
) -> Contest:
    """Measure, write and draw. What is wrong with the files to write is said before anything is measured."""
    accuracies = read_accuracies(accuracy) if accuracy is not None else {}
    for path in (picture, timeline, out):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no directory {path.parent}; make it first")
    torch.set_num_threads(threads)
    task = tasks.classification(num_classes, mean=(0.5,) * channels, std=(0.25,) * channels)
    # The reference is plain float32 whatever else is asked for.
    variants = ["fp32", *(name for name in dict.fromkeys(variant) if name != "fp32")]
    ways = standard_ways(
        task, read_methods(method), num_blocks, variants=variants, parts=parts, combinations=combinations
    )
    if "fp32" not in variant:
        ways = [way for way in ways if way is ways[0] or way.variant != "fp32"]
    found = contest(
        model,
        ways,
        batch_size=batch_size,
        image_size=image_size,
        channels=channels,
        num_classes=num_classes,
        balance=balance,
        device=device_of(device),
        rounds=rounds,
        seed=seed,
        timeline=timeline is not None,
        progress=progress,
    )
    if out is not None:
        out.write_text(json.dumps(found.as_dict(), indent=1) + "\n", encoding="utf-8")
    if picture is not None:
        pareto_picture(found, picture, accuracies)
    if timeline is not None:
        timeline_picture(found, timeline)
    return found
