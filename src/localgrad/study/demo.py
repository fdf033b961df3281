"""The first command: what local learning gives and costs beside everything exact, on a small transformer, in a minute.

Two runs are trained, end to end and locally. What keeps end to end's gradients would come to the same weights, up to
rounding, and so would micro-batches and residence of the local run: of these a step is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from pathlib import Path

from rich.console import Console

from localgrad import methods
from localgrad.config import Config
from localgrad.sealed import write
from localgrad.spec import MethodSpec, build_method
from localgrad.study.contest import contest
from localgrad.study.contest_plots import demo_picture
from localgrad.study.contest_report import Row, thinned
from localgrad.study.ways import ADAMW, REFERENCE, Way
from localgrad.task import Task
from localgrad.train.experiment import with_method
from localgrad.train.finished import model_of
from localgrad.train.folder import RunFolder
from localgrad.train.run import run

PARTS, ROUNDS = 4, 3  # micro-batches, timed steps of each way
BATCH = 128  # images of a measured step; training takes small ones, as the digits are few
PICTURE = "demo.png"
PICTURED = (REFERENCE, "checkpointing", f"accumulation x{PARTS}", "local", f"local x{PARTS}, one block")


@dataclasses.dataclass(frozen=True)
class Line:
    """One way: what its step costs, the test accuracy it comes to, and whether that is of a run of its own."""

    row: Row
    score: float
    trained: bool


def ways_of(config: Config, task: Task) -> list[Way]:
    """What is compared, by AdamW: everything exact, then the local method, whose blocks step one by one."""
    e2e, local, k = methods.e2e(task), build_method(config.method, task), config.blocks.num_blocks
    recomputing, several = methods.checkpointing(e2e), methods.accumulation(local, parts=PARTS)
    end_to_end = Way(REFERENCE, REFERENCE, e2e, optimizer=ADAMW)
    recomputed = Way("checkpointing", "checkpointing", recomputing, k, optimizer=ADAMW)
    one = Way("local", "local", local, k, per_block=True, optimizer=ADAMW)
    parts = dataclasses.replace(one, name=f"local x{PARTS}", method=several)
    return [
        end_to_end,
        recomputed,
        Way(f"accumulation x{PARTS}", "accumulation", methods.accumulation(e2e, parts=PARTS), optimizer=ADAMW),
        dataclasses.replace(
            recomputed, name=f"checkpointing x{PARTS}", method=methods.accumulation(recomputing, parts=PARTS)
        ),
        one,
        parts,
        dataclasses.replace(parts, name=f"{parts.name}, one block", resident=True),
    ]


def demo(config: Config, out: Path, console: Console) -> list[Line]:
    """Train ``config`` end to end and by its method, measure a step of every way, and draw ``out/demo.png``.

    Args:
        config: of classes, with AdamW, a number of blocks and a model without BatchNorm, whose micro-batches would be
            another training.
        out: a new folder, for the runs, ``demo.json`` and the picture.
    """
    out.mkdir(parents=True, exist_ok=True)
    scores = {}
    specs: dict[str, MethodSpec] = {REFERENCE: ["e2e"], "local": config.method}
    for name, spec in specs.items():
        folder = RunFolder(out / name)
        folder.claim()
        with contextlib.closing(folder):
            resume_with = f"localgrad train --resume {shlex.quote(str(folder.path))}"
            trained, result = run(with_method(config, spec), folder, console, name, resume_with)
        scores[name] = result["last"]["score"]["model"]
    channels, side, _ = shape = trained.data.input_shape
    found = contest(
        model_of(config, trained.data.num_classes, shape), ways_of(config, trained.network.method.task),
        batch_size=BATCH, image_size=side, channels=channels, num_classes=trained.data.num_classes,
        device=trained.network.device, rounds=ROUNDS, timeline=True,
        progress=lambda what: console.print(what, style="dim"),
    )  # fmt: skip
    accuracy = {row: scores[row.kind if row.kind in scores else REFERENCE] for row in found.rows}
    title = f"{config.model.name} on {trained.data.title}"
    rows = [dataclasses.asdict(row) | {"timeline": thinned(row.timeline)} for row in found.rows]
    kept = {"title": title, "scores": scores, **dataclasses.asdict(found), "rows": rows}
    write(out / "demo.json", json.dumps(kept) + "\n")
    pictured = {row: score for row, score in accuracy.items() if row.name in PICTURED}
    demo_picture(found, pictured, title, out / PICTURE)
    return [Line(row, accuracy[row], row.name in scores) for row in found.rows]
