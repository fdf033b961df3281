"""One page for each public module, from its docstrings."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from localgrad.measure.tables import markdown
from pages import write_pages

PUBLIC = {
    "localgrad": "The names that most users need",
    "localgrad.cuts": "Where to cut",
    "localgrad.spans": "Which blocks a loss trains",
    "localgrad.timetable": "The order of a step",
    "localgrad.method": "Methods, terms and rules",
    "localgrad.site": "What a builder of heads is told",
    "localgrad.task": "What a task has to say",
    "localgrad.tasks": "Tasks",
    "localgrad.heads": "Auxiliary heads",
    "localgrad.bridges": "What a head looks through",
    "localgrad.losses": "Losses besides the task's own",
    "localgrad.layout": "Forms of features",
    "localgrad.models": "Networks",
    "localgrad.data": "Data",
    "localgrad.data.text": "Text",
    "localgrad.planning": "What fits in memory",
    "localgrad.recompute.pointwise": "Pointwise recomputation",
    "localgrad.measure.memory": "Bytes alive in a step",
    "localgrad.exits": "Answers from the first heads",
    "localgrad.distributed": "More than one device",
    "localgrad.distributed.elastic": "Replicas that come and go",
    "localgrad.train.capture": "CUDA graphs",
    "localgrad.integrations.transformers": "Trainers of transformers and TRL",
    "localgrad.study.contest": "Costs of ways to train",
    "localgrad.study.diagnosis": "Looks inside blocks",
    "localgrad.testing": "Promises as asserts",
    "localgrad.errors": "Errors",
}
OWN_SECTIONS = re.compile(r"^(Source|Differs|Example|Examples): *(?=\S)")


def write(folder: Path) -> None:
    """A page for every public module, and the one that lists them."""
    names = {module.replace(".", "-"): module for module in PUBLIC}
    pages = {page: _page(module) for page, module in names.items()}
    rows = [
        ("module", "what it holds"),
        *((f"[`{module}`]({page}.md)", PUBLIC[module]) for page, module in names.items()),
    ]
    tree = [f"{module} <{page}>" for page, module in names.items()]
    index = [
        "# Reference",
        "",
        *markdown(rows, {0, 1}),
        "",
        "[Methods](../methods/index.md) have pages of their own.",
        "",
    ]
    index += ["```{toctree}", ":hidden:", "", *tree, "```", ""]
    write_pages(folder, {**pages, "index": "\n".join(index)})


def _page(name: str) -> str:
    """What the module has by itself, or in ``__all__``; what another page shows is left to that page."""
    module = importlib.import_module(name)
    lines = [f"# `{name}`", "", "```{eval-rst}", f".. automodule:: {name}", "   :members:"]
    exported = getattr(module, "__all__", [])
    if exported:
        elsewhere = [one for one in exported if _home(getattr(module, one)) in PUBLIC.keys() - {name}]
        lines += ["   :imported-members:", *([f"   :exclude-members: {', '.join(elsewhere)}"] if elsewhere else [])]
    if name == "localgrad":
        rows = [
            ("name", "what"),
            *((f"{{py:obj}}`~{_target(module, one)}`", _first(getattr(module, one))) for one in exported),
        ]
        lines[2:2] = [*markdown(rows, {0, 1}), ""]
    return "\n".join([*lines, "```", ""])


def _home(thing: Any) -> str:
    """The module that an object was made in, or that it is."""
    return thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None) or ""


def _target(module: ModuleType, name: str) -> str:
    """Where the object called so is documented."""
    home = _home(getattr(module, name))
    return home if home.endswith(f".{name}") else f"{home if home in PUBLIC else module.__name__}.{name}"


def _first(thing: Any) -> str:
    """The first line of its docstring, in Markdown."""
    line = (thing.__doc__ or "").strip().splitlines()[0]
    return re.sub(r"`+", "`", line).replace("|", r"\|")


def as_signature(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A default that a dataclass makes anew is shown as ``...``, which can be parsed."""
    return signature and signature.replace("<factory>", "..."), returns


def as_restructured(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """``Source:`` and ``Differs:`` begin paragraphs of their own."""
    found: list[str] = []
    for line in lines:
        if OWN_SECTIONS.match(line):
            found += ["", OWN_SECTIONS.sub(r"**\1:** ", line)]
        else:
            found.append(line)
    lines[:] = found
