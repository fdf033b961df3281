"""Pictures of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK, GRID = "#222222", "#dddddd"
REFERENCES = {"end-to-end": INK, "checkpointing": "#16a085", "accumulation": "#2980b9"}  # what is no local learning


def new_figure(columns: int, height: float = 3.6, width: float = 5.2) -> tuple[Any, Any]:
    """A figure and its axes side by side, each of this size in inches."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    for axis in axes[0]:
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes[0]


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


def save_figure(figure: Any, path: Path) -> None:
    """Write it, with legends that stand outside the axes."""
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)
    pyplot.close(figure)


def curves_picture(history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss and accuracy of every head over epochs, early blocks dark and late ones light, the model's own in red."""
    from matplotlib import colormaps

    figure, (left, right) = new_figure(2)
    split = "validation" if "validation" in history[-1] else "train"
    epochs = [row["epoch"] for row in history]
    for axis, where, what, scale in ((left, "train", "loss", 1), (right, split, "score", 100)):
        names = list(dict.fromkeys(name for row in history for name in row[where][what]))
        inner = [name for name in names if name != "model"]
        for index, name in enumerate(inner):
            color = colormaps["viridis"](index / max(1, len(inner) - 1) * 0.9)
            label = name if len(inner) <= 6 or index in (0, len(inner) - 1) else None
            values = [scale * row[where][what].get(name, math.nan) for row in history]  # heads may rest in an epoch
            axis.plot(epochs, values, color=color, linewidth=1.2, marker="." if len(epochs) < 3 else None, label=label)
        own = [scale * row[where][what]["model"] for row in history]
        axis.plot(epochs, own, color="#c0392b", linewidth=2.2, marker="." if len(epochs) < 3 else None, label="model")
        axis.set_xlabel("epoch")
        axis.set_xlim(min(epochs[0], 1) - 0.05 * len(epochs), max(epochs[-1], 2) + 0.05 * len(epochs))
        _whole_numbers(axis)
        axis.legend(fontsize=8, frameon=False)
    left.set_title("training loss", fontsize=10)
    right.set_title(f"{'validation' if split == 'validation' else 'training'} accuracy, %", fontsize=10)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def comparison_picture(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy of every head of each method, and accuracy against activation memory, bubble area by step time."""
    figure, (left, right) = new_figure(2, 4.0)
    markers = "osD^vPX"
    colors = ["#c0392b", "#2c3e50", "#7f8c8d", "#2980b9", "#8e44ad", "#16a085", "#d35400"]
    slowest = max(r["cost"]["step_seconds"] for r in results)
    for index, result in enumerate(results):
        color, scores = colors[index % len(colors)], result["last"]["score"]
        places = [result["blocks"] if name == "model" else int(name.split()[-1].split("-")[-1]) for name in scores]
        style = {"marker": markers[index % len(markers)], "markersize": 9 - min(index, 5), "color": color, "alpha": 0.9}
        left.plot(places, [100 * s for s in scores.values()], label=result["method"], zorder=3 + index, **style)
        size = 60 + 340 * result["cost"]["step_seconds"] / slowest
        memory = result["cost"]["activation_bytes"] / 2**20
        right.scatter(
            memory, 100 * scores["model"], s=size, color=color, alpha=0.75, label=result["method"], linewidths=0
        )
    left.set_xlabel("read out after block")
    left.set_ylabel(f"{results[0]['split']} accuracy, %")
    left.set_title("every head", fontsize=10)
    _whole_numbers(left)
    left.legend(fontsize=8, frameon=False)
    right.set_xlabel("activation memory of a training step, MiB")
    right.margins(y=0.35)
    right.set_xlim(0, 1.15 * max(r["cost"]["activation_bytes"] for r in results) / 2**20)
    right.set_ylabel(f"{results[0]['split']} accuracy, %")
    right.set_title("accuracy against memory (area: time of a step)", fontsize=10)
    legend = right.legend(fontsize=8, frameon=False, loc="lower center")
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    save_figure(figure, path)
