"""Pictures of a contest: memory against time with the frontier, and what is alive during a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localgrad.errors import ConfigError
from localgrad.measure.plots import INK, KINDS, MUTED, PURPLE, drawing, label, log_scale
from localgrad.study.contest_report import Contest, Row

MARKERS = {"": "o", "per-block step": "^", "checkpointing inside": "v", "micro-batches": "P"}


def pareto_picture(found: Contest, path: Path) -> None:
    """Memory of a step against its time, one point for each way; a line joins those that no other one dominates.

    Args:
        found: its first row is (1, 1). Where no row counts weights, activations and gradients stand alone.
    """
    from matplotlib.lines import Line2D

    places = {row: (row.memory_ratio(found.rows[0]) or 0.0, row.time_ratio) for row in found.rows if row.memory}
    rows, frontier = list(places), found.frontier
    kinds = list(dict.fromkeys(row.kind for row in rows))
    forms = [form for form in dict.fromkeys(_form(row) for row in rows) if form]
    with drawing(path, height=6.2) as (figure, (axis,)):
        steps = sorted(places[row] for row in frontier)
        axis.step(*zip(*steps, strict=True), where="post", color=MUTED, linewidth=1.2, zorder=1)
        for row in rows:
            color, marker = KINDS[row.kind], MARKERS[_form(row)]
            axis.scatter(*places[row], s=75, marker=marker, zorder=3, linewidths=1.3, edgecolors=color,
                         facecolors=color if row in frontier else "white")  # fmt: skip
        log_scale(axis, [memory for memory, _ in places.values()])
        axis.margins(y=0.12)
        above = "activations and gradients at the peak"
        counted = f"weights, optimizer state, {above}" if any(row.weight_bytes for row in rows) else above
        axis.set_xlabel(f"{counted}, end-to-end = 1")
        axis.set_ylabel("time of a step, end-to-end = 1")
        shape = "x".join(map(str, found.image_shape))
        axis.set_title(f"{found.model}, {found.batch_size} images of {shape}, {found.device}")
        keys = [Line2D([], [], color=KINDS[kind], marker="s", linestyle="", label=kind) for kind in kinds]
        keys += [Line2D([], [], color=MUTED, marker=MARKERS[form], linestyle="", fillstyle="none", label=form)
                 for form in forms]  # fmt: skip
        figure.legend(handles=keys, loc="outside lower left", title="what it is", alignment="left", ncols=2)
        texts = [f"{k + 1}  {_short(row.label)}" for k, row in enumerate(frontier)]
        names = [Line2D([], [], linestyle="", label=text) for text in texts]
        figure.legend(handles=names, loc="outside lower right", title="not dominated (filled)", alignment="left",
                      handlelength=0, ncols=2 if max(map(len, texts)) < 30 else 1)  # fmt: skip
        others = [row for row in rows if row not in frontier]
        numbers = [*(str(k + 1) for k in range(len(frontier))), *("" for _ in others)]
        below = (-145, 180, -90, -35, 35, 0, 90)  # the line goes up and to the right
        label(axis, [places[row] for row in [*frontier, *others]], numbers, below)


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
    highest = max(live for row in rows for _, live, *_ in row.timeline) / 2**20
    with drawing(path, len(rows), 3.2) as (figure, axes):
        for axis, row in zip(axes, rows, strict=True):
            _draw_step(axis, row, highest)
            axis.set_title(_short(row.label).replace(", ", ",\n", 1))
        axes[0].set_ylabel("alive above weights, MiB")
        axes[-1].legend(loc="center right")
        shape = "x".join(map(str, found.image_shape))
        figure.suptitle(f"{found.model}, {found.batch_size} images of {shape}")


def _draw_step(axis: Any, row: Row, highest: float, held: int = 0) -> None:
    """What is alive during a step, in MiB, above ``held`` bytes that are there all the time."""
    moments = [100 * seconds / row.timeline[-1][0] for seconds, *_ in row.timeline]
    weights = [(held + visiting) / 2**20 for *_, visiting in row.timeline]
    gradients = [(held + visiting + grads) / 2**20 for _, _, grads, visiting in row.timeline]
    live = [(held + total) / 2**20 for _, total, *_ in row.timeline]
    color, style = KINDS[row.kind], {"step": "post", "linewidth": 0}
    axis.fill_between(moments, gradients, live, facecolor=color, alpha=0.35, label="activations", **style)
    axis.fill_between(
        moments, weights, gradients, facecolor=PURPLE, hatch="////", edgecolor="white", label="gradients", **style
    )
    if max(weights):
        axis.fill_between(moments, 0, weights, facecolor=MUTED, alpha=0.6, label="weights and state", **style)
    axis.step(moments, live, where="post", color=color, linewidth=0.9)
    axis.axhline(max(live), color=color, linewidth=0.8, linestyle=":")
    share = f" = {max(live) / highest:.2f}" if max(live) < highest else ""
    axis.annotate(f"{max(live):.{0 if highest > 100 else 1}f} MiB{share}", (0.98, max(live)), (0, 3), ha="right",
                  xycoords=("axes fraction", "data"), textcoords="offset points", color=INK)  # fmt: skip
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 1.12 * highest)
    axis.set_xlabel("% of the step")


def demo_picture(found: Contest, accuracy: Mapping[Row, float], title: str, path: Path) -> None:
    """Everything that is alive during a step of each way, above it the test accuracy that the way comes to."""
    highest = max(row.memory or 0 for row in accuracy) / 2**20
    with drawing(path, len(accuracy), 3.4) as (figure, axes):
        for axis, (row, score) in zip(axes, accuracy.items(), strict=True):
            _draw_step(axis, row, highest, row.weight_bytes + row.state_bytes)
            axis.set_title(f"{row.name}\n{row.time_ratio:.2f} of the time\n{score:.1%} right")
        axes[0].set_ylabel("alive in a step, MiB")
        figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(f"{title}, a step of {found.batch_size} images")


def timeline_rows(found: Contest) -> list[Row]:
    """The rows that `timeline_picture` shows."""
    whole = [row for row in found.rows if row.timeline and _form(row) != "micro-batches"]
    if not whole:
        raise ConfigError("this contest kept no timelines; measure it with timeline=True")

    def leanest(kind: str) -> list[Row]:
        return sorted((row for row in whole if row.kind == kind), key=lambda row: row.total_bytes or 0)[:1]

    return [whole[0], *leanest("checkpointing"), *leanest("local")]
