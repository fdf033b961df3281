"""Pictures of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, GRID = "#222222", "#dddddd"


def _figure(columns: int, height: float = 3.6) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(5.2 * columns, height), squeeze=False)
    for axis in axes[0]:
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def curves_picture(history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss and accuracy of every head over epochs, early blocks dark and late ones light, the model's own in red."""
    from matplotlib import colormaps

    figure, (left, right) = _figure(2)
    split = "validation" if "validation" in history[-1] else "train"
    epochs = [row["epoch"] for row in history]
    for axis, where, what in ((left, "train", "loss"), (right, split, "score")):
        names = list(history[-1][where][what])
        inner = [name for name in names if name != "model"]
        for index, name in enumerate(inner):
            color = colormaps["viridis"](index / max(1, len(inner) - 1) * 0.9)
            label = name if len(inner) <= 6 or index in (0, len(inner) - 1) else None
            values = [row[where][what].get(name) for row in history]
            axis.plot(epochs, values, color=color, linewidth=1.2, marker="." if len(epochs) < 3 else None, label=label)
        own = [row[where][what]["model"] for row in history]
        axis.plot(epochs, own, color="#c0392b", linewidth=2.2, marker="." if len(epochs) < 3 else None, label="model")
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, frameon=False)
    left.set_title("training loss", fontsize=10)
    right.set_title(f"{'validation' if split == 'validation' else 'training'} accuracy", fontsize=10)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def comparison_picture(results: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy of every head of each method, and accuracy against activation memory, bubble area by step time."""
    figure, (left, right) = _figure(2, 4.0)
    colors = ["#c0392b", "#2c3e50", "#7f8c8d", "#2980b9", "#8e44ad", "#16a085", "#d35400"]
    slowest = max(r["cost"]["step_seconds"] for r in results)
    for index, result in enumerate(results):
        color, scores = colors[index % len(colors)], result["last"]["test"]
        places = [result["blocks"] if name == "model" else int(name.split()[-1].split("-")[-1]) for name in scores]
        left.plot(
            places, [100 * s for s in scores.values()], marker="o", color=color, label=result["method"],
            zorder=3 + len(results) - index, alpha=0.9,
        )  # fmt: skip
        size = 60 + 340 * result["cost"]["step_seconds"] / slowest
        memory = result["cost"]["activation_bytes"] / 2**20
        right.scatter(memory, 100 * scores["model"], s=size, color=color, alpha=0.75, label=result["method"], linewidths=0)
    left.set_xlabel("read out after block")
    left.set_ylabel("test accuracy, %")
    left.set_title("every head", fontsize=10)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8, frameon=False)
    right.set_xlabel("activation memory of a training step, MiB")
    right.set_xlim(left=0)
    right.margins(y=0.35)
    right.set_ylabel("test accuracy, %")
    right.set_title("accuracy against memory (area: time of a step)", fontsize=10)
    legend = right.legend(fontsize=8, frameon=False, loc="lower center")
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    _save(figure, path)
