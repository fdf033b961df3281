"""Every picture of README.md, docs and results, drawn from the files under results/.

    python scripts/figures.py            # draw all of them
    python scripts/figures.py NAME ...   # those whose path holds one of the names
    python scripts/figures.py --check    # exit 1 if a picture is older than its sources or unknown

A picture carries a SHA-256 over its sources and the code that draws it, in a text chunk of the PNG.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import drawings
from localgrad.calibration import Curve
from localgrad.distributed import timeline
from localgrad.measure import plots
from localgrad.planning import report
from localgrad.study import contest_plots

ROOT = Path(__file__).parents[1]
CHUNK = "Sources"
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Figure:
    """How a picture is made.

    Args:
        draw: called with the path of the picture and those of the sources.
        sources: below ``results/``.
        code: modules and functions that draw, besides `drawings` and `plots`.
    """

    draw: Callable[..., None]
    sources: tuple[str, ...]
    code: tuple[Any, ...] = ()

    def digest(self, root: Path = ROOT) -> str:
        """SHA-256 of the sources' bytes and of the code's text."""
        found = hashlib.sha256()
        for source in self.sources:
            found.update(hashlib.sha256((root / "results" / source).read_bytes()).digest())
        for code in (drawings, plots, *self.code):
            found.update(hashlib.sha256(inspect.getsource(code).encode()).digest())
        return found.hexdigest()


BENCH, OPPONENTS, STEPS = "bench-2026-11-21", "opponents-2026-11-28", "timelines-2026-11-28"
LEAN, FIDELITY, LLAMA = "lean-2026-11-21", "fidelity-2026-11-28", "language-models-2026-11-28"
PARETO, PLAN = (contest_plots,), (report._draw,)
FIGURES = {
    **{f"results/{BENCH}/{name}.png": Figure(drawings.pareto, (f"{BENCH}/{name}.json",), PARETO)
       for name in ("resnet32", "vit_small", "resnet50", "resnet101")},
    **{f"results/{OPPONENTS}/{name}.png": Figure(drawings.printed, (f"{OPPONENTS}/{name}.txt",), PARETO)
       for name in ("vit_tiny", "resnet50")},
    **{f"results/{STEPS}/{name}.png": Figure(drawings.timeline, (f"{STEPS}/{name}.json",), PARETO)
       for name in ("resnet32", "vit_small", "resnet101")},
    "results/demo-2026-11-28/demo.png": Figure(drawings.demo, ("demo-2026-11-28/demo.json",), PARETO),
    **{f"results/plans-2026-11-29/{name}.png": Figure(drawings.plan, (f"plans-2026-11-29/{name}.json",), PLAN)
       for name in ("resnet152", "vit-l")},
    **{f"docs/{name}.png": Figure(draw, (f"scenes-2026-11-28/{name}.npz",))
       for name, draw in (("detection", drawings.detection), ("segmentation", drawings.segmentation))},
    f"results/{LEAN}/cifar10.png": Figure(
        drawings.lean, (f"{LEAN}/cifar10/rows.jsonl", f"{LEAN}/costs-8.json", f"{LEAN}/costs-16.json")
    ),
    f"results/{FIDELITY}/frontier.png": Figure(
        drawings.frontier,
        tuple(f"{FIDELITY}/{part}/{name}" for part in ("by-bytes", "initialisation")
              for name in ("rows.jsonl", "costs.json")),
    ),
    f"results/{LLAMA}/curves.png": Figure(drawings.language_models, (f"{LLAMA}/runs-0.jsonl", f"{LLAMA}/runs-1.jsonl")),
    "results/exits-2026-11-28/exits.png": Figure(drawings.exits, ("exits-2026-11-28/exits.json",), (Curve.picture,)),
    "results/distributed-2026-11-21/timeline.png": Figure(
        drawings.ranks, ("distributed-2026-11-21/timeline.json",), (timeline.picture,)
    ),
}  # fmt: skip


def shown(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """Pages written by hand, and the pictures of this repository on them, as paths from its root."""
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md")), *sorted((root / "results").rglob("*.md"))]:
        for target in IMAGE.findall(page.read_text(encoding="utf-8")):
            if "://" not in target:
                yield str(page.relative_to(root)), str((page.parent / target).resolve().relative_to(root.resolve()))


def draw(name: str, root: Path = ROOT) -> None:
    """Make a picture and note what it was made from."""
    figure, path = FIGURES[name], root / name
    figure.draw(path, *(root / "results" / source for source in figure.sources))
    note = PngInfo()
    note.add_text(CHUNK, figure.digest(root))
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, pnginfo=note, optimize=True)


def complaints(root: Path = ROOT) -> list[str]:
    """Pictures that are missing or older than their sources, and those on pages that nothing here draws."""
    found = [f"{page} shows {name}, which scripts/figures.py does not know" for page, name in shown(root)
             if name not in FIGURES]  # fmt: skip
    for name, figure in FIGURES.items():
        if not (root / name).exists():
            found.append(f"{name} is not there; run python scripts/figures.py {name}")
            continue
        with Image.open(root / name) as image:
            if image.info.get(CHUNK) != figure.digest(root):
                found.append(f"{name} is older than what it is made from; run python scripts/figures.py {name}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.check:
        found = complaints()
        print(*found, sep="\n", end="\n" if found else "")
        return int(bool(found))
    for name in FIGURES:
        if not asked.names or any(part in name for part in asked.names):
            draw(name)
            print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
