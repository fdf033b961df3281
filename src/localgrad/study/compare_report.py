"""The table and the picture of a comparison, made from its files alone."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localgrad.errors import ConfigError
from localgrad.measure.plots import REFERENCES, drawing, label, series
from localgrad.measure.tables import markdown
from localgrad.sealed import write
from localgrad.spec import described
from localgrad.study.compare import (
    REFERENCE,
    ROWS,
    Settings,
    costing,
    equal_epochs,
    key_of,
    like_another,
    read_costs,
    trained_as,
    without,
)
from localgrad.study.rows import read_rows

TABLE, PICTURE = "table.md", "picture.png"


@dataclass(frozen=True)
class Line:
    """One way to train with one number of epochs.

    Args:
        settings: without the seed.
        rows: of the runs whose last epoch it shows, by seed; those of another way if that yields the same weights.
        cost: of a step, None where it was not measured.
    """

    settings: Settings
    rows: tuple[dict[str, Any], ...]
    cost: dict[str, Any] | None

    @property
    def epochs(self) -> int:
        """Passes over the training data."""
        return int(self.settings["train"]["epochs"])

    @property
    def scores(self) -> list[float]:
        """Score of the last epoch of each run that ended, in percent."""
        return [100 * row["score"] for row in self.rows if "score" in row]

    @property
    def mean(self) -> float | None:
        """Of the scores; None where no run has ended."""
        return statistics.mean(self.scores) if self.scores else None

    @property
    def flops(self) -> float | None:
        """Of the whole training, None where unknown."""
        steps = next((row["steps"] for row in self.rows if "steps" in row), None)
        return None if steps is None or self.cost is None else float(steps * self.cost["flops"])

    @property
    def recomputes(self) -> bool:
        """Whether it recomputes what others keep."""
        return bool(trained_as(self.settings)["method"] != self.settings["method"])

    @property
    def borrows(self) -> bool:
        """Whether its weights are those of another way."""
        return self.recomputes or bool(self.settings["optim"].get("in_backward"))

    @property
    def kind(self) -> str:
        """What it is beside local learning: ``end-to-end``, ``checkpointing``, ``accumulation``, else ``local``."""
        method = self.settings["method"]
        if method[:1] != REFERENCE:
            return "local"
        if self.recomputes:
            return "checkpointing"
        return "end-to-end" if len(method) == 1 else "accumulation"


def lines_of(out: Path) -> list[Line]:
    """Everything that was measured or trained: each way with each number of epochs it was trained for.

    Raises:
        ConfigError: there is nothing yet.
    """
    rows, costs = read_rows(out / ROWS, "run"), read_costs(out)
    if not rows and not costs:
        raise ConfigError(f"{out} holds no comparison yet; name a recipe and methods first")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows.values():
        groups.setdefault(key_of(without(row["settings"], "seed")), []).append(row)
    lengths = dict.fromkeys(row["settings"]["train"]["epochs"] for row in rows.values())
    found: dict[str, Line] = {}
    for cost in costs.values():
        for epochs in lengths:
            settings = cost["settings"]
            settings = {**settings, "train": {**settings["train"], "epochs": epochs}}
            trained = groups.get(key_of(trained_as(settings)), [])
            if trained:
                found[key_of(settings)] = _line(settings, trained, cost)
    for key, group in groups.items():
        if key not in found:
            found[key] = _line(without(group[0]["settings"], "seed"), group, None)
    for cost in costs.values():
        settings = cost["settings"]
        if not any(costing(line.settings) == settings for line in found.values()):
            epochs = next(iter(lengths), 0)
            settings = {**settings, "train": {**settings["train"], "epochs": epochs}}
            found[key_of(settings)] = _line(settings, [], cost)
    order = {kind: k for k, kind in enumerate([*REFERENCES, "local"])}
    return sorted(found.values(), key=lambda line: (order[line.kind], line.kind != "local" and line.epochs))


def worth_showing(lines: Sequence[Line]) -> list[Line]:
    """Lines but for those with borrowed weights of an end-to-end training that only filled a given time."""
    lengths = {line.epochs for line in lines if line.kind in ("local", "accumulation")}
    return [line for line in lines if not line.borrows or line.epochs in lengths or not lengths]


def _line(settings: Settings, rows: Iterable[dict[str, Any]], cost: dict[str, Any] | None) -> Line:
    return Line(settings, tuple(sorted(rows, key=lambda row: row["settings"]["train"]["seed"])), cost)


def names_of(lines: Sequence[Line]) -> list[str]:
    """What to call each line: its method and blocks, and every setting in which it is not like most of the others."""
    flat = [_flat(line.settings) for line in lines]
    usual = {name: Counter(map(str, (f.get(name) for f in flat))).most_common(1)[0][0] for f in flat for name in f}
    names = []
    for line, settings in zip(lines, flat, strict=True):
        blocks = settings["blocks.num_blocks"]
        unlike = [
            f"{name.rpartition('.')[2]} {value}"
            for name, value in settings.items()
            if str(value) != usual[name] and name not in ("method", "blocks.num_blocks")
            and not (name.startswith("blocks.") and blocks == 1)
        ]  # fmt: skip
        where = [f"K={blocks}"] if blocks not in (None, 1) else []
        names.append(", ".join([described(line.settings["method"]), *where, *unlike]))
    return names


def _flat(settings: Settings, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and prefix + name in ("blocks", "optim", "train"):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def reference_of(lines: Sequence[Line]) -> Line:
    """End-to-end training, which the others are compared with: of several the one that most lines share settings with.

    Raises:
        ConfigError: its costs were not measured.
    """
    whole = [line for line in lines if line.kind == "end-to-end" and line.cost is not None]
    if not whole:
        raise ConfigError("the costs of end-to-end training are missing; name the recipe again")
    epochs = Counter(line.epochs for line in lines).most_common(1)[0][0]
    alike = {id(one): sum(like_another(one.settings, line.settings) for line in lines) for one in whole}
    return max(whole, key=lambda line: (alike[id(line)], line.epochs == epochs, len(line.rows)))


def table(out: Path) -> str:
    """One line for each way, in Markdown."""
    lines = lines_of(out)
    reference = reference_of(lines)
    assert reference.cost is not None
    row = next((row for line in lines for row in line.rows if "metrics" in row), None)
    metric = next(iter(row["metrics"])) if row else "score"
    split = row.get("split", "test") if row else "test"
    headings = [
        "method", f"{split} {metric}, last epoch", "by seed", "activations", "with gradients", "peak from outside",
        "optimizer state", "time of a step", "FLOPs of training", "auxiliary parameters", "end-to-end, same time",
        "checkpointing, same time",
    ]  # fmt: skip
    body = []
    chosen = worth_showing(lines)
    for name, line in zip(names_of(chosen), chosen, strict=True):
        shown = [_mean(line), ", ".join(f"{score:.1f}" for score in line.scores)]
        failed = [row for row in line.rows if "failed" in row]
        if failed:
            seeds = [f"seed {row['settings']['train']['seed']} failed" for row in failed]
            shown[1] = ", ".join(filter(None, [shown[1], *seeds]))
        if line.borrows and line.rows:
            same = described(trained_as(line.settings)["method"])
            shown[1] = f"as {'end-to-end' if same == 'e2e' else same}, bit for bit"
        body.append([name, *shown, *_costs(line, reference), *_rivals(line, lines, reference)])
    cost = reference.cost
    text = [f"# Methods compared in {out.name}", "", *markdown([headings, *body], text=range(len(headings))), ""]
    data, batch = row["data"] if row else reference.settings["data"]["name"], reference.settings["train"]["batch_size"]
    text.append(
        f"{reference.settings['model']['name']} on {data}, {reference.epochs} epochs, batches of {batch}, unless "
        f"the line says otherwise. {split.capitalize()} {metric} in percent: mean and, over several seeds, half the "
        "range. Costs are ratios to end-to-end training: activations "
        f"{cost['activation_bytes'] / 2**20:.1f} MiB, with gradients {cost['total_bytes'] / 2**20:.1f} MiB, "
        f"{cost['seconds'] * 1e3:.0f} ms ({cost['clock']}, median of {cost['rounds']} rounds in turn), "
        f"{cost['flops'] / 1e9:.1f} GFLOP a step; auxiliary parameters as a ratio to the model's. Live tensors "
        "cannot be seen where steps are compiled; the peak from outside is the growth of the process or the allocator. "
        f"{cost['device']}, threads: {cost['threads']}, torch {cost['torch']}, {cost['date']}."
    )
    text.append(
        "Same time: end-to-end training, and the same with checkpointing in as many blocks, for as many epochs (in "
        'brackets) as it does in the time of the line\'s; "not run" where no such run was asked for (--equal-time).'
    )
    return "\n".join(text) + "\n"


def _mean(line: Line) -> str:
    if line.mean is None:
        return "failed" if line.rows else "not run"
    spread = (max(line.scores) - min(line.scores)) / 2
    return f"{line.mean:.1f}" + (f" ± {spread:.1f}" if len(line.scores) > 1 else "")


def _costs(line: Line, reference: Line) -> list[str]:
    own, of = line.cost, reference.cost
    if own is None or of is None:
        return ["-"] * 7
    flops = line.flops / reference.flops if line.flops and reference.flops else own["flops"] / of["flops"]
    return [
        *(_ratio(own, of, f"{name}_bytes") for name in ("activation", "total", "peak", "state")),
        f"{own['time_ratio']:.2f}",
        f"{flops:.2f}",
        f"{own['auxiliary_parameters'] / own['parameters']:.2f}",
    ]


def _ratio(own: dict[str, Any], of: dict[str, Any], name: str) -> str:
    """Of bytes; files of older versions lack some, and compiled steps others."""
    return f"{own[name] / of[name]:.3f}" if own.get(name) is not None and of.get(name) else "-"


def _rivals(line: Line, lines: Sequence[Line], reference: Line) -> list[str]:
    """What end-to-end training, by a line's settings if it can, reaches in its time, without and with checkpointing."""
    if line.kind in ("end-to-end", "checkpointing") or line.cost is None:
        return ["", ""]
    costs = {key_of(costing(other.settings)): other.cost for other in lines if other.cost is not None}
    cells = []
    for kind in ("end-to-end", "checkpointing"):
        measured = [other for other in lines if other.kind == kind and other.cost is not None]
        of_line, of_all = (
            [other for other in measured if like_another(one.settings, other.settings)] for one in (line, reference)
        )
        same = of_line or of_all
        # Of checkpointing the one that is cut like the line, where there are several.
        same.sort(key=lambda other: other.settings["blocks"] != line.settings["blocks"])
        epochs = equal_epochs(line.settings, same[0].settings, costs) if same else 0
        found = next((other for other in same if other.epochs == epochs and other.mean is not None), None)
        cells.append("-" if not same else f"{_mean(found)} ({epochs})" if found else f"not run ({epochs})")
    return cells


def picture(out: Path, path: Path) -> None:
    """Score against activations, time and FLOPs of training; a bar spans the seeds. Drawn once a run has ended."""
    from matplotlib.lines import Line2D

    lines = lines_of(out)
    reference = reference_of(lines)
    shown = [line for line in worth_showing(lines) if line.mean is not None and line.cost is not None]
    names = names_of(shown)
    if not shown or reference.cost is None:
        return
    methods = list(dict.fromkeys(described(line.settings["method"]) for line in shown if line.kind == "local"))
    row = next(row for line in shown for row in line.rows if "metrics" in row)
    columns = ("activations of a step", "time of training", "FLOPs of training")
    with drawing(path, 3, 4.2 + 0.1 * len(shown)) as (figure, axes):
        points: list[list[tuple[float, ...]]] = [[] for _ in columns]
        keys = []
        for number, (name, line) in enumerate(zip(names, shown, strict=True), start=1):
            assert line.cost is not None and line.mean is not None
            local = line.kind == "local"
            style = {**series(methods.index(described(line.settings["method"])) if local else 0), "linestyle": ""}
            style |= {} if local else {"color": REFERENCES[line.kind], "marker": "*"}
            keys.append(Line2D([], [], label=f"{number}  {name}", **style))
            held, low, high = line.cost["activation_bytes"], min(line.scores), max(line.scores)
            flops = (line.flops or 0.0) / (reference.flops or line.flops or 1.0)
            seconds = line.cost["time_ratio"] * line.epochs / reference.epochs
            places = held and held / reference.cost["activation_bytes"], seconds, flops
            for axis, found, place in zip(axes, points, places, strict=True):
                place = math.nan if place is None else place  # a compiler's tensors cannot be seen
                error = [[line.mean - low], [high - line.mean]]
                axis.errorbar(place, line.mean, yerr=error, markersize=7, elinewidth=1.0, capsize=2, **style)
                found.append((place, line.mean, low, high))
        for axis, column in zip(axes, columns, strict=True):
            axis.set_xlabel(f"{column},\nend-to-end = 1")
            axis.margins(x=0.12, y=0.12)
            low, high = axis.get_xlim()
            if high / max(low, 1e-9) > 4:
                axis.set_xlim(left=0)
        axes[0].set_ylabel(f"{row.get('split', 'test')} {next(iter(row['metrics']))}, last epoch, %")
        figure.suptitle(f"{reference.settings['model']['name']} on {row['data']}, {reference.epochs} epochs")
        figure.legend(handles=keys, loc="outside lower center", ncols=min(3, len(keys)))
        for axis, found in zip(axes, points, strict=True):
            seen = [k for k, point in enumerate(found) if not math.isnan(point[0])]
            label(axis, [found[k] for k in seen], [str(k + 1) for k in seen])


def report(out: Path) -> str:
    """Write table and picture from the files in ``out``; returns the table."""
    text = table(out)
    write(out / TABLE, text)
    picture(out, out / PICTURE)
    return text
