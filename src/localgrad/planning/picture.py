"""The curve of a plan: peak memory against step time."""

from __future__ import annotations

import math
from pathlib import Path

from localgrad.planning.report import Option, Plan
from localgrad.planning.sizes import size

_STYLES = {
    "plain": ("*", "#222222"),
    "accumulation": ("s", "#2980b9"),
    "checkpointing": ("o", "#16a085"),
    "checkpointing, micro-batches": ("P", "#16a085"),
    "local": ("o", "#d35400"),
    "local, per-block step": ("^", "#d35400"),
    "local, recomputed": ("v", "#8e44ad"),
    "local, recomputed, per-block step": ("<", "#8e44ad"),
    "local, micro-batches": ("P", "#d35400"),
    "local, micro-batches, per-block step": ("X", "#d35400"),
}  # marker and color


def draw(plan: Plan, path: Path) -> None:
    """One point for each option, a line for each kind, the budget and what is recommended."""
    from matplotlib.ticker import FixedLocator, NullLocator

    from localgrad.bench.plots import new_figure, save_figure

    figure, (axis,) = new_figure(1, 4.6)
    figure.set_size_inches(8.4, 4.6)
    groups: dict[str, list[Option]] = {}
    for option in plan.options:
        in_parts = option.micro_batches > 1 and option.kind != "accumulation"
        group = option.kind + ", micro-batches" * in_parts
        group += ", recomputed" * (option.kind == "local" and "recomputed" in option.name and not in_parts)
        group += ", per-block step" * option.per_block
        groups.setdefault(group, []).append(option)
    labelled: list[tuple[float, float]] = []
    for group, members in groups.items():
        marker, color = _STYLES.get(group, ("o", "#7f8c8d"))
        x, y = [o.peak / 2**30 for o in members], [o.time_ratio for o in members]
        axis.plot(x, y, marker=marker, color=color, linewidth=1, alpha=0.85, label=group, markersize=7)
        for option, a, b in zip(members, x, y, strict=True):
            note = f"x{option.micro_batches}" if option.micro_batches > 1 else f"K={option.num_blocks}"
            crowded = any(abs(math.log(a / c)) < 0.04 and abs(b - d) < 0.02 for c, d in labelled)
            if option.kind != "plain" and not crowded:
                labelled.append((a, b))
                axis.annotate(note, (a, b), (3, 4), textcoords="offset points", fontsize=7, color=color)
    if plan.memory is not None:
        for limit, style in ((plan.memory, "-"), (plan.memory * (1 - plan.headroom), ":")):
            axis.axvline(limit / 2**30, color="#222222", linewidth=1, linestyle=style)
        axis.annotate(
            f" {size(plan.memory)}", (plan.memory / 2**30, 0.98), xycoords=("data", "axes fraction"),
            fontsize=8, va="top",
        )  # fmt: skip
    if (best := plan.recommended) is not None:
        ring = {"s": 230, "facecolors": "none", "edgecolors": "#c0392b", "linewidths": 1.8, "zorder": 5}
        axis.scatter([best.peak / 2**30], [best.time_ratio], label="recommended", **ring)
    axis.set_xscale("log")
    peaks = [o.peak / 2**30 for o in plan.options]
    ticks = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 3, 5, 7)]
    axis.xaxis.set_major_locator(FixedLocator([t for t in ticks if min(peaks) * 0.7 < t < max(peaks) * 1.5]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("predicted peak, GiB")
    axis.set_ylabel("predicted step time, plain training = 1")
    axis.set_title(f"{plan.model}, {plan.batch_size} images, {plan.optimizer}, {plan.precision}", fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
