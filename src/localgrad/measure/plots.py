"""Pictures of runs, and what all pictures share: size, type, colours, labels that lie on nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

WIDTH = 9.0  # inches of every picture: 1,170 dots, of which a page shows about 830
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "figure.titlesize": 11,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "legend.title_fontsize": 9,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.borderaxespad": 0.2,
    "hatch.linewidth": 0.7, "savefig.dpi": 130,
}  # fmt: skip

# Colours that readers who see fewer of them still tell apart (Okabe and Ito, jfly.uni-koeln.de/color). Some are equally
# light, so what is told by colour is told by marker, line or hatch as well.
INK, MUTED = "#000000", "#6b6b6b"
BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"
PALETTE, MARKERS, LINES = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY), "os^DvPX<>pd", ("-", "--", "-.", ":")
REFERENCES = {"end-to-end": INK, "checkpointing": ORANGE, "accumulation": GREEN}  # what is no local learning
KINDS = {**REFERENCES, "local": BLUE}  # these four differ in grey


def series(index: int) -> dict[str, Any]:
    """Colour, marker and line of a series; neighbours differ in all three, the first eleven in their markers."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


@contextmanager
def drawing(path: Path, columns: int = 1, height: float = 3.6, rows: int = 1) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes (a flat array), of this height in inches and as wide as all are; written to ``path``."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns, squeeze=False).flatten()
        save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write it."""
    figure.savefig(path)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def log_scale(axis: Any, values: Sequence[float]) -> None:
    """Powers of ten and round numbers between them along x, as far as the values go."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min(values) / 1.25, max(values) * 1.25
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    ticks = [m * 10.0**e for e in range(-4, 4) for m in (1, 1.5, 2, 3, 5, 7)]
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low < tick < high]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def label(
    axis: Any, points: Sequence[tuple[float, ...]], texts: Sequence[str],
    degrees: Sequence[int] = (0, 35, -35, 90, -90, 180, 145, -145),
) -> list[Any]:  # fmt: skip
    """Write a text beside each point, where it covers no point, no bar and no other text; returns the annotations.

    The limits, the legend and all else that the layout depends on must be there. A line leads to a text that had to
    go further than the rest.

    Args:
        points: (x, y), or (x, y, low, high) where a bar goes through the point.
        texts: empty for a point that is only not to be covered.
        degrees: where a text may stand, seen from its point, the best first.
    """
    from matplotlib.transforms import Bbox

    figure = axis.get_figure()
    figure.draw_without_rendering()
    dots, renderer = figure.dpi / 72, figure.canvas.get_renderer()
    room, at, taken = axis.get_window_extent(), [], []
    for x, y, *bar in points:
        at.append(axis.transData.transform((x, y)))
        ends = [axis.transData.transform((x, end)) for end in bar or (y, y)]
        taken.append(Bbox([ends[0] - 5 * dots, ends[1] + 5 * dots]))
    notes = []
    for k in sorted(range(len(points)), key=lambda k: -at[k][0]):  # from the right, as most texts stand to the right
        if not texts[k]:
            continue
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        note = axis.annotate(
            texts[k], points[k][:2], (0, 0), textcoords="offset points", color=INK, fontsize=9, va="center",
            ha="center", arrowprops=line, zorder=6, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
        note.set_in_layout(False)
        width, height = note.get_window_extent(renderer).size
        fewest = 2 * len(taken) + 1
        for distance, angle in product((8, 14, 22, 32, 44, 58), map(math.radians, degrees)):
            x = at[k][0] + math.cos(angle) * (distance * dots + width / 2)
            y = at[k][1] + math.sin(angle) * (distance * dots + height / 2)
            box = Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            covered = sum(box.overlaps(other) for other in taken) + (0 if inside else len(taken))
            if covered < fewest:
                fewest, chosen, offset, far = covered, box, (x - at[k][0], y - at[k][1]), distance > 8
            if not covered:
                break
        note.set_position((offset[0] / dots, offset[1] / dots))
        note.arrow_patch.set_visible(far)
        taken.append(chosen)
        notes.append(note)
    return notes


def curves_picture(history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss and accuracy of every head over epochs, early blocks dark and late ones light, the model's own in black."""
    from matplotlib import colormaps

    split = "validation" if "validation" in history[-1] else "train"
    epochs = [row["epoch"] for row in history]
    marker = "." if len(epochs) < 3 else None
    with drawing(path, 2) as (figure, (left, right)):
        for axis, where, what, scale in ((left, "train", "loss", 1), (right, split, "score", 100)):
            names = list(dict.fromkeys(name for row in history for name in row[where][what]))
            inner = [name for name in names if name != "model"]
            for index, name in enumerate(inner):
                color = colormaps["viridis"](index / max(1, len(inner) - 1) * 0.9)
                shown = name if len(inner) <= 6 or index in (0, len(inner) - 1) else None
                values = [scale * row[where][what].get(name, math.nan) for row in history]  # heads may rest in an epoch
                axis.plot(epochs, values, color=color, linewidth=1.2, marker=marker, label=shown)
            own = [scale * row[where][what]["model"] for row in history]
            axis.plot(epochs, own, color=INK, linestyle="--", linewidth=2, marker=marker, label="model")
            axis.set_xlabel("epoch")
            axis.set_xlim(min(epochs[0], 1) - 0.05 * len(epochs), max(epochs[-1], 2) + 0.05 * len(epochs))
            _whole_numbers(axis)
            axis.legend()
        left.set_title("training loss")
        right.set_title(f"{'validation' if split == 'validation' else 'training'} accuracy, %")
        figure.suptitle(title)


def comparison_picture(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy of every head of each method, and accuracy against activation memory, marker area by step time."""
    slowest = max(r["cost"]["step_seconds"] for r in results)
    with drawing(path, 2, 4.0) as (figure, (left, right)):
        for index, result in enumerate(results):
            style, scores = series(index), result["last"]["score"]
            places = [result["blocks"] if name == "model" else int(name.split()[-1].split("-")[-1]) for name in scores]
            left.plot(places, [100 * s for s in scores.values()], label=result["method"], zorder=3 + index, **style)
            size = 60 + 340 * result["cost"]["step_seconds"] / slowest
            memory = result["cost"]["activation_bytes"] / 2**20
            right.scatter(
                memory, 100 * scores["model"], s=size, color=style["color"], marker=style["marker"], alpha=0.75
            )
        left.set_xlabel("read out after block")
        left.set_ylabel(f"{results[0]['split']} accuracy, %")
        left.set_title("every head")
        _whole_numbers(left)
        right.set_xlabel("activation memory of a training step, MiB")
        right.margins(y=0.35)
        right.set_xlim(0, 1.15 * max(r["cost"]["activation_bytes"] for r in results) / 2**20)
        right.set_ylabel(f"{results[0]['split']} accuracy, %")
        right.set_title("accuracy against memory (area: time of a step)")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(results)))
