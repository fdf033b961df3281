"""Pictures of a contest: memory against time with the frontier, and what is alive during a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localgrad.errors import ConfigError
from localgrad.measure.plots import REFERENCES, log_scale, new_figure, save_figure
from localgrad.study.contest_report import Contest, Row

COLORS = {**REFERENCES, "local": "#d35400"}
MARKERS = {"": "o", "per-block step": "^", "checkpointing inside": "v", "micro-batches": "P"}


def pareto_picture(found: Contest, path: Path) -> None:
    """Memory of a step against its time, one point for each way; a line joins those that no other one dominates.

    Args:
        found: its first row is (1, 1).
    """
    from matplotlib.lines import Line2D

    figure, (axis,) = new_figure(1, 5.2, width=11.5)
    places = {row: (row.memory_ratio(found.rows[0]) or 0.0, row.time_ratio) for row in found.rows if row.memory}
    rows, frontier = list(places), found.frontier
    steps = sorted(places[row] for row in frontier)
    axis.step(*zip(*steps, strict=True), where="post", color="#999999", linewidth=1.4, zorder=1)
    for row in rows:
        on = row in frontier
        color, marker = COLORS[row.kind], MARKERS[_form(row)]
        axis.scatter(*places[row], s=75, marker=marker, zorder=3, linewidths=1.3, edgecolors=color,
                     facecolors=color if on else "white")  # fmt: skip
    for k, row in enumerate(frontier):
        axis.annotate(str(k + 1), places[row], (-6, -12), textcoords="offset points", fontsize=8.5, ha="right",
                      color=COLORS[row.kind], fontweight="bold", zorder=4)  # fmt: skip
    log_scale(axis, [memory for memory, _ in places.values()])
    axis.margins(y=0.12)
    axis.set_xlabel("weights, optimizer state and the peak above them, end-to-end = 1")
    axis.set_ylabel("time of a step, end-to-end = 1")
    shape = "x".join(map(str, found.image_shape))
    axis.set_title(f"{found.model}, {found.batch_size} images of {shape}, {found.device}", fontsize=10.5)
    kinds = list(dict.fromkeys(row.kind for row in rows))
    forms = [form for form in dict.fromkeys(_form(row) for row in rows) if form]
    keys = [Line2D([], [], color=COLORS[kind], marker="o", linestyle="", label=kind) for kind in kinds]
    keys += [Line2D([], [], color="#777777", marker=MARKERS[f], linestyle="", fillstyle="none", label=f) for f in forms]
    legend = axis.legend(handles=keys, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    axis.add_artist(legend)
    blank = [Line2D([], [], linestyle="", label=f"{k + 1}  {_short(row.label)}") for k, row in enumerate(frontier)]
    axis.legend(handles=blank, fontsize=7.5, frameon=False, loc="lower left", bbox_to_anchor=(1.01, -0.02),
                title="not dominated (filled)", title_fontsize=8, alignment="left", handlelength=0)  # fmt: skip
    save_figure(figure, path)


def _form(row: Row) -> str:
    if row.name.endswith("inside"):
        return "checkpointing inside"
    if row.name.rpartition(" ")[2].startswith("x"):
        return "micro-batches"
    return "per-block step" if row.name.endswith("per-block step") else ""


def _short(name: str) -> str:
    return name.replace("checkpointing", "ckpt.").replace("per-block step", "per block")


def timeline_picture(found: Contest, path: Path) -> None:
    """What is alive during a step: end-to-end, the leanest checkpointing on the whole batch, the leanest local way.

    Args:
        found: with timelines.
    """
    rows = timeline_rows(found)
    figure, axes = new_figure(len(rows), 3.2, width=3.8)
    highest = max(live for row in rows for _, live, *_ in row.timeline) / 2**20
    for axis, row in zip(axes, rows, strict=True):
        _draw_step(axis, row, highest)
        axis.set_title(_short(row.label), fontsize=9.5)
    axes[0].set_ylabel("alive above weights, MiB", fontsize=9)
    axes[-1].legend(fontsize=8, frameon=False, loc="center right")
    shape = "x".join(map(str, found.image_shape))
    figure.suptitle(f"{found.model}, {found.batch_size} images of {shape}", fontsize=10.5)
    save_figure(figure, path)


def _draw_step(axis: Any, row: Row, highest: float, held: int = 0) -> None:
    """What is alive during a step, in MiB, above ``held`` bytes that are there all the time."""
    moments = [100 * seconds / row.timeline[-1][0] for seconds, *_ in row.timeline]
    weights = [(held + visiting) / 2**20 for *_, visiting in row.timeline]
    gradients = [(held + visiting + grads) / 2**20 for _, _, grads, visiting in row.timeline]
    live = [(held + total) / 2**20 for _, total, *_ in row.timeline]
    style: dict[str, Any] = {"step": "post", "linewidth": 0}
    axis.fill_between(moments, gradients, live, color=COLORS[row.kind], alpha=0.4, label="activations", **style)
    axis.fill_between(moments, weights, gradients, color="#8e44ad", alpha=0.75, label="gradients", **style)
    if max(weights):
        axis.fill_between(moments, 0, weights, color="#7f8c8d", alpha=0.6, label="weights and state", **style)
    axis.step(moments, live, where="post", color=COLORS[row.kind], linewidth=0.9)
    axis.axhline(max(live), color=COLORS[row.kind], linewidth=0.8, linestyle=":")
    share = f" = {max(live) / highest:.2f}" if max(live) < highest else ""
    axis.annotate(f"{max(live):.{0 if highest > 100 else 1}f} MiB{share}", (0.98, max(live)), (0, 3),
                  xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=8.5,
                  color=COLORS[row.kind])  # fmt: skip
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 1.1 * highest)
    axis.set_xlabel("% of the step", fontsize=9)
    axis.tick_params(labelsize=8)


def demo_picture(found: Contest, rows: Sequence[Row], accuracy: Mapping[Row, float], title: str, path: Path) -> None:
    """Everything that is alive during a step of ``rows``, and of all ways accuracy against the most that is."""
    figure, axes = new_figure(len(rows) + 1, 3.4, width=3.2)
    highest = max(row.memory or 0 for row in found.rows) / 2**20
    for axis, row in zip(axes, rows, strict=False):
        _draw_step(axis, row, highest, row.weight_bytes + row.state_bytes)
        axis.set_title(row.name, fontsize=9.5)
    axes[0].set_ylabel("alive in a step, MiB", fontsize=9)
    axes[len(rows) - 1].legend(fontsize=8, frameon=False, loc="center right")
    last = axes[-1]
    for number, (row, score) in enumerate(accuracy.items(), start=1):
        place = ((row.memory or 0) / 2**20, 100 * score)
        last.scatter(*place, s=60, color=COLORS[row.kind], linewidths=0, label=f"{number}  {row.name}")
        last.annotate(str(number), place, (0, 7 if number % 2 else -14), textcoords="offset points", fontsize=8,
                      ha="center", color=COLORS[row.kind])  # fmt: skip
    last.legend(fontsize=7.5, frameon=False, loc="lower right")
    last.set_xlim(0, 1.1 * highest)
    last.set_ylim(0, 110)
    last.set_xlabel("most that is alive in a step, MiB", fontsize=9)
    last.set_title("test accuracy, %", fontsize=9.5)
    last.tick_params(labelsize=8)
    figure.suptitle(f"{title}, a step of {found.batch_size} images", fontsize=10.5)
    save_figure(figure, path)


def timeline_rows(found: Contest) -> list[Row]:
    """The rows that `timeline_picture` shows."""
    whole = [row for row in found.rows if row.timeline and _form(row) != "micro-batches"]
    if not whole:
        raise ConfigError("this contest kept no timelines; measure it with timeline=True")

    def leanest(kind: str) -> list[Row]:
        return sorted((row for row in whole if row.kind == kind), key=lambda row: row.total_bytes or 0)[:1]

    return [whole[0], *leanest("checkpointing"), *leanest("local")]
