"""One page for each method that is exported: its spans drawn, its docstring, and what was measured of it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import wrap

import localgrad
from localgrad.measure.tables import markdown
from localgrad.recipes import read_recipe, recipe_costs, recipes
from localgrad.spans import Span
from localgrad.spec import build_method, described, known_methods, method_name
from localgrad.study.compare_report import Line, lines_of
from localgrad.timetable import drawn, timetable
from pages import write_pages

BLOCKS = 4
WIDE, HIGH, LEFT = 110, 26, 70  # of a block and a row of the drawing, and where the first block begins
TASK = localgrad.tasks.classification(10)
NEEDS: dict[str, dict[str, Callable[[], object]]] = {
    "feature_distillation": {"teacher": lambda: localgrad.models.resnet8()}
}


def write(folder: Path, results: Path) -> None:
    """A page for every method, and the one that lists them."""
    measured = dict(_measured(results))
    pages = {name: _page(name, base, measured) for name, base in known_methods().items()}
    write_pages(folder, {**pages, "index": _index()})


def _index() -> str:
    lines = [
        "# Methods",
        "",
        "A base takes a task. A plug-in takes a method. Plug-ins compose: `pgl(man(dgl(task)))` is a method again.",
        "Each page shows which blocks a loss trains, the options, and what was measured.",
        "",
    ]
    for base, title in ((True, "Bases"), (False, "Plug-ins")):
        names = [name for name, is_base in known_methods().items() if is_base is base]
        rows = [("method", "what it does"), *((f"[{name}]({name}.md)", _summary(name)) for name in names)]
        tree = ["```{toctree}", ":hidden:", ":caption: " + title, *names, "```"]
        lines += [f"## {title}", "", *markdown(rows, {0, 1}), "", *tree, ""]
    return "\n".join(lines)


def _summary(name: str) -> str:
    """The first line of its docstring, in Markdown."""
    (first, *_) = (getattr(localgrad.methods, name).__doc__ or "").strip().splitlines()
    return first.replace("``", "`").replace("`localgrad.methods.", "`").replace("|", r"\|")


def _page(name: str, base: bool, measured: dict[str, list[tuple[str, Line, Line]]]) -> str:
    options = {key: make() for key, make in NEEDS.get(name, {}).items()}
    method = getattr(localgrad.methods, name)(TASK if base else localgrad.methods.dgl(TASK), **options)
    patterns = method.spans.patterns(BLOCKS)
    over = "" if base else " over `dgl`"
    lines = [f"# {name}", "", f"{_summary(name)}", "", "## Spans", ""]
    lines += [f"Four blocks, `{method.name}`. A bar is what one loss trains; the dot is where it is read.", ""]
    lines += ["````{only} html", "```{raw} html", _drawing(patterns), "```", "````", ""]
    if len(patterns) > 1:
        lines += ["The method uses each of these sets of spans on some steps.", ""]
    lines += ["## Options", "", "```{eval-rst}", f".. autofunction:: localgrad.methods.{name}", "```", ""]
    lines += [f"## As a value{over}", "", "```text", str(method), "```", ""]
    lines += ["## The order of a step", ""]
    for spans in patterns:
        lines += ["```text", *_wrapped(drawn(timetable(spans, BLOCKS))), "```", ""]
    lines += ["[Architecture](../architecture.md) explains the rows.", ""]
    return "\n".join([*lines, *_evidence(name, measured.get(name, [])), *_recipes(name)])


def _wrapped(rows: str) -> list[str]:
    """Lines that break between rows only."""
    lines = wrap(re.sub(r"(?<![|]) (?![|])", "~", rows), 80, break_on_hyphens=False)
    return [line.replace("~", " ") for line in lines]


def _drawing(patterns: tuple[tuple[Span, ...], ...]) -> str:
    """An SVG: blocks from left to right, a bar for every span, one group of bars below the other."""
    rows = [span for spans in patterns for span in spans]
    height = HIGH * (len(rows) + len(patterns)) + 40
    width = LEFT + BLOCKS * WIDE + 40
    parts = [
        f'<svg class="spans" role="img" aria-label="Spans of a method in {BLOCKS} blocks" '
        f'viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">'
    ]
    for k in range(BLOCKS):
        x = LEFT + k * WIDE
        parts.append(f'<rect class="block" x="{x + 2}" y="4" width="{WIDE - 4}" height="24" rx="4"/>')
        parts.append(f'<text x="{x + WIDE / 2}" y="21" text-anchor="middle">block {k}</text>')
    for b in range(BLOCKS + 1):
        x = LEFT + b * WIDE
        parts.append(f'<line class="boundary" x1="{x}" y1="32" x2="{x}" y2="{height - 6}"/>')
    y = 48
    for spans in patterns:
        for span in spans:
            start, stop = LEFT + span.start * WIDE + 6, LEFT + span.stop * WIDE
            kind = "own" if span.stop == BLOCKS else "inner"
            parts.append(f'<text x="{LEFT - 12}" y="{y + 5}" text-anchor="end">{span}</text>')
            parts.append(f'<line class="{kind}" x1="{start}" y1="{y}" x2="{stop}" y2="{y}"/>')
            parts.append(f'<circle class="{kind}" cx="{stop}" cy="{y}" r="6"/>')
            y += HIGH
        y += HIGH
    return "\n".join([*parts, "</svg>"])


def _measured(results: Path) -> Iterator[tuple[str, list[tuple[str, Line, Line]]]]:
    """For every method: the folders and lines of comparisons in which it took part, with their end-to-end training."""
    found: dict[str, list[tuple[str, Line, Line]]] = {name: [] for name in known_methods()}
    for rows in sorted(results.glob("**/rows.jsonl")):
        if not (rows.parent / "costs.json").exists():
            continue
        lines = lines_of(rows.parent)
        references = {line.epochs: line for line in lines if line.kind == "end-to-end"}
        for line in lines:
            if line.mean is None or line.epochs not in references or not _can_be_written(line):
                continue
            for part in dict.fromkeys(method_name(line.settings["method"]).split("+")):
                if part in found:
                    found[part].append((rows.parent.relative_to(results).as_posix(), line, references[line.epochs]))
    yield from found.items()


def _can_be_written(line: Line) -> bool:
    """Whether the method has kept its options since it was measured."""
    try:
        build_method(line.settings["method"], TASK)
    except localgrad.LocalgradError:
        return False
    return True


def _evidence(name: str, measured: list[tuple[str, Line, Line]]) -> list[str]:
    if not measured:
        return ["## Measured", "", "No comparison in [the results](../../results/log.md) contains this method.", ""]
    rows: list[Sequence[str]] = [
        ("results", "data", "way", "K", "accuracy, %", "end-to-end, %", "activations", "FLOPs", "time", "seeds")
    ]
    for folder, line, reference in measured:
        settings, home = line.settings, folder.partition("/")[0]
        cost, whole = line.cost, reference.cost
        ratios = ["-"] * 3
        if cost is not None and whole is not None:
            time = f"{cost['time_ratio']:.2f}" if cost["rounds"] > 1 else "-"
            ratios = [*(f"{cost[key] / whole[key]:.2f}" for key in ("activation_bytes", "flops")), time]
        rows.append(
            (
                f"[{folder}](../../results/{home}/README.md)",
                f"{settings['data']['name']}, {settings['model']['name'].rpartition(':')[2]}",
                f"`{described(settings['method'])}`",
                str(settings["blocks"]["num_blocks"] or len(settings["blocks"]["cuts"]) + 1),
                _spread(line.scores),
                _spread(reference.scores),
                *ratios,
                str(len(line.scores)),
            )
        )
    return [
        "## Measured",
        "",
        "From the files in `results/`. Accuracy is that of the last epoch on the test set, with half of the range over",
        "seeds. Activations, FLOPs and time are ratios to end-to-end training. A time of a single round is left out.",
        "Epochs, data and hardware are on the page that a row links to. What the papers promise and what came of it is",
        "in [the claims](../../results/claims/README.md).",
        "",
        *markdown(rows, {0, 1, 2}),
        "",
    ]


def _spread(scores: list[float]) -> str:
    mean = f"{statistics.mean(scores):.1f}"
    return f"{mean} ± {(max(scores) - min(scores)) / 2:.1f}" if len(scores) > 1 else mean


def _recipes(name: str) -> list[str]:
    """Published rows, with the cost of a step."""
    rows: list[Sequence[str]] = [("recipe", "published", "FLOPs", "activations", "trained beside the model")]
    costs = recipe_costs()
    for recipe in recipes():
        if not recipe.startswith(f"{name}/") or recipe not in costs:
            continue
        cost = costs[recipe]
        about = read_recipe(recipe).get("about", {})
        ratio = cost["auxiliary_parameters"] / cost["parameters"]
        steps = [cost["flops"] / cost["e2e_flops"], cost["activation_bytes"] / cost["e2e_activation_bytes"], ratio]
        rows.append((f"`{recipe}`", about.get("published") or "-", *(f"{value:.2f}" for value in steps)))
    if len(rows) == 1:
        return []
    intro = [
        "## Recipes",
        "",
        f"`localgrad train recipe:{rows[1][0].strip('`')}` trains the first one. FLOPs and activations of a step are",
        "ratios to end-to-end training of the same network. The last column is a ratio to the parameters of the model.",
        "",
    ]
    return [*intro, *markdown(rows, {0, 1}), ""]
