"""The least seconds that a card's bandwidth and arithmetic allow for a step, method by method.

python bench/floors.py                  # ResNet-32 at batch 1024, ResNet-101 at batch 128 and 224 pixels
python bench/floors.py resnet32 --bandwidth 3.35e12 --flops 990e12     # another card than an H200
python bench/floors.py --measured results/2026-11-27-h200 --out results/floors-2026-11-28

Every operation of forward and backward of the whole step is counted by shapes, on tensors without data: its FLOPs, and
the bytes that it reads and writes as it stands, each operation by itself. Three floors follow:

    arithmetic   FLOPs / peak
    traffic      bytes / bandwidth
    each         sum over the operations of the larger of the two, as one kernel runs after the other

A compiler that fuses operations moves fewer bytes, and may go below ``traffic`` and ``each``, never below
``arithmetic``. The optimizer is left out. Activations are in bfloat16 by autocast; its casts are operations too.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from localgrad import models, tasks
from localgrad.measure.tables import markdown
from localgrad.measure.work import Rates, measure_rates
from localgrad.method import Method
from localgrad.partition import by_count
from localgrad.planning import Planner
from localgrad.spec import build_method, described, parse_method
from localgrad.train.experiment import device_of

LINEAR = "[{dgl: {head: linear}}]"
CHECKPOINTED = "e2e+checkpointing"


@dataclass(frozen=True)
class Case:
    """A network and the methods whose steps are counted.

    Args:
        ways: method as on the command line, number of blocks (None for as many as there are units), and the name of its
            row among the measured ones, ``""`` for none.
        counted: cut by count instead of by bytes.
    """

    model: str
    batch_size: int
    side: int
    num_classes: int
    ways: tuple[tuple[str, int | None, str], ...]
    counted: bool = False


CASES = {
    "resnet32": Case(
        "resnet32", 1024, 32, 10,
        (
            ("e2e", 1, "e2e-captured"), (CHECKPOINTED, 16, ""), ("e2e+accumulation", 1, ""), (LINEAR, 16, ""),
            ("dgl", 16, "dgl-captured"), ("predsim", 16, ""), ("infopro", 16, ""), ("auglocal", 16, ""),
            ("lean", 16, ""), ("dgl+man", 16, ""), ("dgl+man_pp", 16, ""), ("dgl+mlaan", 16, ""),
            ("dgl+hpff", 16, ""), ("dgl+trgl", 16, ""), ("dgl+sgr", 16, ""),
        ),
        counted=True,
    ),
    "resnet101": Case(
        "torchvision:resnet101", 128, 224, 1000,
        (
            ("e2e", 1, "end-to-end"), (CHECKPOINTED, None, "checkpointing every unit"),
            (CHECKPOINTED, 4, "checkpointing K=4"), ("e2e+accumulation", 1, "accumulation x4"),
            (LINEAR, 4, "dgl(head=linear) K=4"), (LINEAR, 8, ""),
        ),
    ),
    "resnet8": Case("resnet8", 8, 16, 10, (("e2e", 1, ""), (CHECKPOINTED, None, ""), (LINEAR, 3, ""))),  # for tests
}  # fmt: skip


@dataclass(frozen=True)
class Floor:
    """A step of one method: what it does, and what follows for a card.

    Args:
        flops: 2 per multiply-add.
        bytes: read and written.
        arithmetic, traffic, each: seconds, see above.
        measured: seconds of a step, None where they are not known.
    """

    method: str
    num_blocks: int
    flops: float
    bytes: float
    arithmetic: float
    traffic: float
    each: float
    measured: float | None = None


def floor_of(planner: Planner, method: Method, num_blocks: int | None, counted: bool, card: Rates) -> Floor:
    """Count one step, on tensors without data.

    Args:
        planner: of the network and the batch; its rates are changed.
        num_blocks: K, None for as many as there are units.
        counted: whether blocks have equally many units rather than bytes.
        card: peaks of the device.
    """
    blocks = len(planner.partition.cuts) + 1 if num_blocks is None else num_blocks
    cuts = by_count(planner.partition, blocks) if counted else planner.cuts(blocks, method)
    network = planner.network(method, [cut.name for cut in cuts])
    planner.rates = Rates(math.inf, 1.0)  # arithmetic takes no time, a byte takes a second
    traffic = planner.step(network, method).seconds
    planner.rates = card
    step = planner.step(network, method)
    return Floor(method.name, blocks, step.flops, traffic, step.flops / card.flops, traffic / card.bytes, step.seconds)


def floors(case: Case, card: Rates, known: dict[str, float]) -> list[Floor]:
    """All rows of a network; ``known`` has measured seconds of a step."""
    model = models.create(case.model, num_classes=case.num_classes, image_size=case.side)
    task = tasks.classification(case.num_classes, mean=(0.5,) * 3, std=(0.25,) * 3)
    planner = Planner(model, (3, case.side, case.side), case.batch_size, "bf16", card, task)
    rows = []
    for text, num_blocks, row in case.ways:
        method = build_method(parse_method(text), task)
        found = floor_of(planner, method, num_blocks, case.counted, card)
        rows.append(replace(found, method=described(parse_method(text)), measured=known.get(row)))
    return rows


def measured(name: str, folder: Path | None) -> dict[str, float]:
    """Seconds of a step that a folder of results has: epochs of ResNet-32 in speed.json, rows of bench-r101.json."""
    if folder is None or name not in ("resnet32", "resnet101"):
        return {}
    if name == "resnet32":
        speed = json.loads((folder / "speed.json").read_text())
        return {key: row["best"] * 1024 / 50_000 for key, row in speed.items() if isinstance(row, dict)}
    rows = json.loads((folder / "bench-r101.json").read_text())["rows"]
    return {row["name"]: row["seconds"] for row in rows if row["variant"] == "bf16+channels_last"}


def table(case: Case, rows: list[Floor], card: Rates) -> str:
    """Markdown."""
    cells = [["method", "blocks", "GFLOP", "GB", "arithmetic", "traffic", "each", "measured", "measured / each"]]
    for row in rows:
        known = (f"{1e3 * row.measured:.1f}", f"{row.measured / row.each:.2f}") if row.measured else ("", "")
        seconds = (f"{1e3 * value:.3g}" for value in (row.arithmetic, row.traffic, row.each))
        numbers = (f"{row.flops / 1e9:.4g}", f"{row.bytes / 1e9:.3g}")
        cells.append([row.method, str(row.num_blocks), *numbers, *seconds, *known])
    head = f"{case.model}, batch {case.batch_size} of {case.side} pixels, bf16; {card.flops / 1e12:.0f} TFLOP/s, "
    head += f"{card.bytes / 1e12:.2f} TB/s; milliseconds of forward and backward"
    return "\n".join([head, "", *markdown(cells, text=(0,))])


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Those of the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet32", "resnet101"], help=f"of {', '.join(CASES)}")
    parser.add_argument("--flops", type=float, default=790e12, help="FLOP/s in bfloat16, of an H200")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes/s, of an H200")
    parser.add_argument("--measure-rates", action="store_true", help="measure both on the card that is here")
    parser.add_argument("--measured", type=Path, help="results with speed.json and bench-r101.json")
    parser.add_argument("--out", type=Path, help="folder for NETWORK.json and NETWORK.md")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """The command."""
    asked = arguments(words)
    card = Rates(asked.flops, asked.bandwidth)
    if asked.measure_rates:
        card = replace(measure_rates(device_of("auto"), torch.bfloat16), start=0.0)
    for name in asked.networks:
        case = CASES[name]
        rows = floors(case, card, measured(name, asked.measured))
        text = table(case, rows, card)
        print(text, end="\n\n", flush=True)
        if asked.out is not None:
            asked.out.mkdir(parents=True, exist_ok=True)
            (asked.out / f"{name}.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
            (asked.out / f"{name}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
