"""Drawings of single results: each takes its files and writes one picture. `figures.py` has the table of all."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from localgrad.calibration import Curve, Outcome
from localgrad.distributed.simulate import BlockCost, LinkSpeed, forecast
from localgrad.distributed.timeline import Event, picture
from localgrad.measure.plots import BLUE, INK, KINDS, MUTED, PURPLE, SKY, VERMILLION, drawing, label, log_scale, series
from localgrad.measure.work import Rates
from localgrad.planning.report import Option, Plan
from localgrad.planning.streaming import Traffic
from localgrad.spec import described
from localgrad.study.compare_report import Line, lines_of, reference_of
from localgrad.study.contest_plots import demo_picture, pareto_picture, timeline_picture
from localgrad.study.contest_report import Contest, Row
from localgrad.study.demo import PICTURED
from localgrad.study.ways import REFERENCE


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _made(cls: type, values: dict[str, Any], /, **others: Any) -> Any:
    """A dataclass from those of the values that are its fields; what was a tuple before it was JSON is one again."""
    known = {f.name: values[f.name] for f in fields(cls) if f.name in values} | others
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


def _groups(pattern: str, text: str) -> tuple[Any, ...]:
    match = re.match(pattern, text)
    assert match is not None, text
    return match.groups()


def pareto(path: Path, source: Path) -> None:
    """Memory against time, from `bench.json`; files of before 28 November count no weights and know one optimizer."""
    values = _read(source)
    bare = {"optimizer": "SGD", "weight_bytes": 0, "state_bytes": 0}
    pareto_picture(_made(Contest, values, rows=[_made(Row, {**bare, **row}) for row in values["rows"]]), path)


def printed(path: Path, source: Path) -> None:
    """The same from a printed table, whose memory is a ratio in three digits."""
    title, _, *lines = source.read_text(encoding="utf-8").splitlines()
    head, _, *table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    rows = []
    for cells in table:
        row = dict(zip(head, [*cells, ""], strict=False))
        name, optimizer, variant = _groups(r"(.*?)(?:, (Adam\w+))?(?:, (fp32\+\w+))?$", row["way"])
        kind = next((kind for kind in KINDS if row["way"].startswith(kind)), "local")
        rows.append(_made(
            Row, {}, name=name, kind=kind, method="", variant=variant or "fp32", optimizer=optimizer or "SGD",
            gradients=row["gradients"], num_blocks=0, cuts=(), weight_bytes=round(1e6 * float(row["memory"])),
            state_bytes=0, activation_bytes=0, total_bytes=0, peak_bytes=0, flops=None, auxiliary_parameters=0,
            time_ratio=float(row["time"]),
        ))  # fmt: skip
        assert row["way"] == rows[-1].label
    model, batch, shape, device = _groups(r"(\S+), .*?(\d+) images of (\S+) a step, (\w+)", title)
    channels, height, width = map(int, shape.split("x"))
    found = Contest(model, 0, int(batch), (channels, height, width), 0, device, 1, "", "", tuple(rows))
    marked = [cells[0] for cells in table if cells[-1] == "frontier"]
    assert sorted(row.label for row in found.frontier) == sorted(marked), (marked, [r.label for r in found.frontier])
    pareto_picture(found, path)


def timeline(path: Path, source: Path) -> None:
    """What is alive during a step, from what bench/timelines.py wrote."""
    values = _read(source)
    timeline_picture(_made(Contest, values, rows=[_made(Row, row) for row in values["rows"]]), path)


def demo(path: Path, source: Path) -> None:
    """What `localgrad demo` draws, from what it wrote."""
    values = _read(source)
    made = (_made(Row, row, timeline=tuple(map(tuple, row["timeline"]))) for row in values["rows"])
    rows = {row.name: row for row in made}
    scores = {name: values["scores"][row.kind if row.kind == "local" else REFERENCE] for name, row in rows.items()}
    found = _made(Contest, values, rows=tuple(rows.values()))
    demo_picture(found, {rows[name]: scores[name] for name in PICTURED}, values["title"], path)


def plan(path: Path, source: Path) -> None:
    """A plan, from `localgrad plan --json`."""
    values = _read(source)
    options = [
        _made(Option, row, traffic=row["traffic"] and _made(Traffic, row["traffic"])) for row in values["options"]
    ]
    found: Plan = _made(Plan, values, rates=_made(Rates, values["rates"]), options=options)
    found.picture(path)


def exits(path: Path, source: Path) -> None:
    """Accuracy against compute of exits."""
    values = _read(source)["curve"]
    outcomes = [_made(Outcome, outcome) for outcome in values["outcomes"]]
    _made(Curve, values, outcomes=outcomes).picture(path)


def ranks(path: Path, source: Path) -> None:
    """Two ranks as bench/block_parallel_timeline.py measured them, above forecasts of 1F1B with the same costs."""
    measured: dict[int, Any] = {}
    for row in _read(source)["traceEvents"]:
        kind, start, step = row["cat"], row["ts"] / 1e6, row["args"]
        event = Event(kind, step["step"], step["micro-batch"], row["tid"], start, start + row["dur"] / 1e6)
        measured.setdefault(row["tid"], []).append(event)
    last = max(event.step for event in measured[1])
    ends = [max(event.end for event in measured[1] if event.step == step) for step in (3, last)]
    shown = {f"block-parallel local learning, measured: {(ends[1] - ends[0]) / (last - 3):.3f} s a step": measured}
    for micro in (1, 4):
        cost = BlockCost(0.03, 0.06, 0.06, 0, 0)
        found = forecast([cost] * 2, LinkSpeed(1e9, 0.0), 8, "1f1b", stages=2, micro_batches=micro)
        title = f"1F1B, {micro} micro-batch{'es' * (micro > 1)}, forecast: {found.seconds:.3f} s a step"
        shown[f"{title}, {found.bubble:.0%} waiting"] = {rank: list(row) for rank, row in enumerate(found.events)}
    picture(shown, path, 0.0, 0.6)


def language_models(path: Path, *sources: Path) -> None:
    """How far each way is above end to end, in percent of its bits, over the steps; means over the seeds."""
    rows: dict[str, dict[int, list[dict[str, float]]]] = {}
    for source in sources:
        for line in source.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.setdefault(row["way"], {})[row["seed"]] = row["curve"]
    whole = rows.pop("e2e")
    with drawing(path, height=4.0) as (_, (axis,)):
        for index, (name, curves) in enumerate(rows.items()):
            steps = [point["step"] for point in next(iter(curves.values()))]
            above = [
                statistics.mean(100 * (c[k]["model"] / whole[seed][k]["model"] - 1) for seed, c in curves.items())
                for k in range(len(steps))
            ]
            axis.plot(steps, above, label=f"{name} ({len(curves)} seed{'s' * (len(curves) > 1)})", **series(index))
        axis.axhline(0, color=INK, linewidth=1)
        axis.set(xlabel="steps of 2,048 bytes", ylabel="bits per byte above end to end, %", ylim=(-2, 12))
        axis.legend(ncols=2)


def _scatter(axis: Any, x: float, scores: list[float], **style: Any) -> tuple[float, ...]:
    """A point at the mean, with a bar from the worst seed to the best; returns what `label` is to keep clear of."""
    mean, low, high = statistics.mean(scores), min(scores), max(scores)
    axis.errorbar(x, mean, yerr=[[mean - low], [high - mean]], linestyle="", capsize=2, elinewidth=1.0, **style)
    return x, mean, low, high


def _spelled_out(depth: int, tail: int, factor: int) -> list[Any]:
    """`lean` as in the rows of the first round, at 16 pixels, where `least` is half of that at 32."""
    return [{"auglocal": {"depth": depth, "tail": tail}}, {"pooled": {"factor": factor, "least": 4, "start": 1}}]


_ACCUMULATION: list[Any] = ["e2e", {"accumulation": {"parts": 4}}]
_LEAN_4 = [_spelled_out(2, 1, 4), [{"lean": {"factor": 4, "least": 4}}]]
_DEEPER_16 = [{"lean": {"depth": 3, "tail": 7, "factor": 4, "least": 2}}]
_RECOMPUTED = "[{lean: {factor: 4, least: 8}}, {checkpointing: {where: pointwise, first: 1}}]"
# Name, blocks, the spellings of the method in the rows of the runs, method in the costs, colour.
_FINALISTS: list[tuple[str, int, list[list[Any]], str, str]] = [
    ("end-to-end", 1, [["e2e"]], "e2e", INK),
    ("checkpointing", 1, [["e2e"]], "e2e+checkpointing", KINDS["checkpointing"]),
    ("accumulation x4", 1, [_ACCUMULATION], "[e2e, {accumulation: {parts: 4}}]", KINDS["accumulation"]),
    ("dgl, 8 blocks", 8, [["dgl"]], "dgl", SKY),
    ("auglocal, 8 blocks", 8, [["auglocal"]], "auglocal", PURPLE),
    ("lean, 8 blocks", 8, [_spelled_out(2, 1, 2)], "lean", BLUE),
    ("lean(factor=4, least=8), 8 blocks", 8, _LEAN_4, "[{lean: {factor: 4, least: 8}}]", VERMILLION),
    ("the same, first recomputed", 8, _LEAN_4, _RECOMPUTED, VERMILLION),
    ("dgl+man_pp, 8 blocks, one seed", 8, [["dgl", "man_pp"]], "dgl+man_pp", MUTED),
    ("dgl, 16 blocks", 16, [["dgl"]], "dgl", SKY),
    ("auglocal, 16 blocks", 16, [["auglocal"]], "auglocal", PURPLE),
    ("lean(tail=5, ...), 16 blocks", 16, [_spelled_out(2, 5, 4)], "[{lean: {tail: 5, factor: 4, least: 8}}]", BLUE),
    ("lean(depth=3, tail=7, ...), 16 blocks", 16, [_DEEPER_16], "[{lean: {depth: 3, tail: 7, factor: 4}}]", VERMILLION),
]


def lean(path: Path, runs: Path, costs_of_8: Path, costs_of_16: Path) -> None:
    """Accuracy against activations, time and FLOPs of a step: the finalists of docs/lean.md on CIFAR-10."""
    rows = [json.loads(line) for line in runs.read_text(encoding="utf-8").splitlines()]
    costs = {1: _read(costs_of_16), 8: _read(costs_of_8), 16: _read(costs_of_16)}
    columns = ("activations", "time", "FLOPs")
    with drawing(path, 3, 5.2) as (figure, axes):
        points: list[list[tuple[float, ...]]] = [[], [], []]
        for number, (name, blocks, spellings, costed, color) in enumerate(_FINALISTS, start=1):
            settings = [(row["settings"], 100 * row["score"]) for row in rows]
            scores = [s for run, s in settings if run["method"] in spellings and run["blocks"]["num_blocks"] == blocks]
            marker = {1: "*", 8: "^", 16: "s"}[blocks]
            for axis, column, found in zip(axes, columns, points, strict=True):
                style = {"color": color, "marker": marker, "label": f"{number}  {name}"}
                found.append(_scatter(axis, costs[blocks][costed][column], scores, markersize=7, **style))
        for axis, column in zip(axes, columns, strict=True):
            axis.set_xlim(left=0)
            axis.set_xlabel(f"{column} of a step, end-to-end = 1")
        log_scale(axes[0], [x for x, *_ in points[0]])
        axes[0].set_ylabel("test accuracy, last epoch, %")
        figure.suptitle("ResNet-32, 20,000 images of CIFAR-10 at 16 pixels, 10 epochs; bars span three seeds")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        for axis, found in zip(axes, points, strict=True):
            label(axis, found, [str(k + 1) for k in range(len(found))])


def _front(axis: Any, points: list[tuple[float, ...]], **style: Any) -> None:
    """A step line through the points that no other one beats in both accuracy and memory."""
    best, steps = -np.inf, []
    for x, y, *_ in sorted(points, key=lambda point: (point[0], -point[1])):
        if y > best:
            steps.append((x, best := y))
    axis.step(*zip(*steps, (1.25, best), strict=True), where="post", zorder=1, linewidth=1.2, **style)


def frontier(path: Path, *sources: Path) -> None:
    """Accuracy against activation memory of every method and opponent in one protocol; areas are times of a step.

    Args:
        sources: rows and costs of folders of `localgrad compare`; a method in several is taken from the first.
    """
    shown: dict[str, tuple[Line, Line]] = {}
    for folder in dict.fromkeys(source.parent for source in sources):
        lines = lines_of(folder)
        for line in lines:
            name = described(line.settings["method"]).removeprefix("dgl+")
            if line.cost is not None and line.scores and "kaiming" not in name:
                shown.setdefault(name, (line, reference_of(lines)))
    names = {"e2e": "end to end", "e2e+checkpointing": "checkpointing", "e2e+accumulation(parts=4)": "accumulation x4"}
    with drawing(path, height=5.4) as (figure, (axis,)):
        points, texts = [], []
        for name, (line, reference) in shown.items():
            assert line.cost is not None and reference.cost is not None
            ratio, time = line.cost["activation_bytes"] / reference.cost["activation_bytes"], line.cost["time_ratio"]
            style = {
                "color": KINDS[line.kind],
                "marker": "o" if line.kind == "local" else "s",
                "markersize": 6 * time**0.5,
            }
            points.append(_scatter(axis, ratio, line.scores, **style))
            texts.append(f"{names.get(name, name)} ({time:.1f})")
        local = [point for point, (line, _) in zip(points, shown.values(), strict=True) if line.kind == "local"]
        _front(axis, points, color=MUTED, label="Pareto front of all ways")
        _front(axis, local, color=BLUE, linestyle="--", label="Pareto front of local methods")
        for kind, marker, text in (("end-to-end", "s", "exact gradients"), ("local", "o", "local, 8 blocks")):
            axis.scatter([], [], color=KINDS[kind], marker=marker, s=36, label=text)
        log_scale(axis, [0.25, *(x for x, *_ in points)])
        axis.margins(y=0.1)
        axis.set_xlabel("activations of a step, end to end = 1")
        axis.set_ylabel("test accuracy, last epoch, %")
        axis.set_title("ResNet-32, 20,000 images of CIFAR-10 at 16 pixels, 10 epochs; bars span seeds")
        told = "in brackets, and as area: time of a step, end to end = 1"
        figure.legend(loc="outside lower center", ncols=2, title=told)
        label(axis, points, texts)


def detection(path: Path, source: Path) -> None:
    """Scenes and the boxes that were found in them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    found = np.load(source)
    looks: dict[str, dict[str, Any]] = {
        "disc": {"color": "white", "linewidth": 2.6},
        "square": {"color": INK, "linestyle": "--", "linewidth": 1.4},
    }
    with drawing(path, len(found["images"]), 2.7) as (figure, axes):
        figure.set_facecolor("#bbbbbb")
        for index, (axis, image) in enumerate(zip(axes, found["images"], strict=True)):
            axis.imshow(image / 31, interpolation="nearest")
            axis.set_axis_off()
            here = [found[column][found["scene"] == index] for column in ("boxes", "labels", "scores")]
            for (x, y, right, bottom), kind, score in zip(*here, strict=True):
                name = str(found["classes"][kind])
                axis.add_patch(Rectangle((x, y), right - x, bottom - y, fill=False, zorder=3 + kind, **looks[name]))
                at_right = x > image.shape[1] / 2
                note = axis.text(
                    right if at_right else x, y - 1 if name == "disc" else bottom + 1.5, f"{name} {score:.0%}",
                    zorder=6, ha="right" if at_right else "left", va="bottom" if name == "disc" else "top",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )  # fmt: skip
                note.set_in_layout(False)
        handles = [Line2D([], [], label=f"called a {name}", **look) for name, look in looks.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)


def segmentation(path: Path, source: Path) -> None:
    """Scenes, their masks, and what a network says."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    found, colors = np.load(source), (SKY, VERMILLION, MUTED, INK)
    with drawing(path, 3, 5.9, rows=3) as (figure, axes):
        columns = {"scene": found["images"] / 31, "mask": found["masks"], "answer": found["answers"]}
        for row in range(3):
            for column, (name, pictures) in enumerate(columns.items()):
                axis = axes[3 * row + column]
                axis.imshow(
                    pictures[row], interpolation="nearest", cmap=ListedColormap(colors), vmin=0, vmax=len(colors) - 1
                )
                axis.set_axis_off()
                axis.set_title(name if row == 0 else "")
        handles = [Patch(color=color, label=str(name)) for color, name in zip(colors, found["classes"], strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
