"""`localgrad list`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from localgrad.cli.console import new_console, new_table
from localgrad.cli.options import Json
from localgrad.errors import ConfigError


def list_(
    what: Annotated[Literal["models", "methods", "data", "recipes"], typer.Argument(help="What to list.")],
    only: Annotated[
        str | None,
        typer.Argument(
            help="With models: a library, timm or torchvision. With recipes: a folder (man), or a part of their names.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List what there is: models, methods, data, recipes."""
    if only is not None and what not in ("models", "recipes"):
        raise ConfigError(f"{only!r} goes with `localgrad list models` or `list recipes`, not with `list {what}`")
    rows = {"models": _models, "methods": _methods, "recipes": _recipes, "data": _data}[what](only)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if what == "recipes":
        _show_recipes(new_console(), rows)
        return
    table = new_table(*(rows[0] if rows else ()), left=9)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    new_console().print(table)
    if what == "models" and only is None:
        new_console().print("And every model of timm and torchvision: localgrad list models timm")


def _models(library: str | None) -> list[dict[str, Any]]:
    from localgrad import models

    if library is not None:
        return [{"name": name} for name in models.available(library)]
    return [{"name": name, "what": (models.OWN[name].__doc__ or "").strip()} for name in models.available()]


def _methods(_: str | None) -> list[dict[str, Any]]:
    from localgrad import methods
    from localgrad.spec import known_methods

    return [
        {
            "name": name,
            "kind": "base" if base else "plug-in",
            "what": (getattr(methods, name).__doc__ or "").strip().splitlines()[0],
        }
        for name, base in sorted(known_methods().items(), key=lambda item: (not item[1], item[0]))
    ]


def _recipes(only: str | None) -> list[dict[str, Any]]:
    from localgrad import config
    from localgrad.recipes import read_recipe, recipe_costs, recipes
    from localgrad.spec import method_name

    known = recipes()
    names = list(known)
    if only is not None:
        begin = [name for name in names if name.startswith(only.rstrip("/") + "/")]
        names = begin or [name for name in names if only in name]
        if not names:
            folders = dict.fromkeys(name.partition("/")[0] for name in known if "/" in name)
            raise ConfigError(f"no recipe is called like {only!r}; folders: {', '.join(folders)}")
    costs = recipe_costs()
    rows = []
    for name in names:
        recipe = config.validate(read_recipe(name), name)
        rows.append(
            {
                "name": name,
                "model": recipe.model.name,
                "data": recipe.data.name,
                "method": method_name(recipe.method),
                "options": recipe.method,
                "blocks": recipe.blocks.num_blocks or len(recipe.blocks.cuts or []) + 1,
                "epochs": recipe.train.epochs,
                **dataclasses.asdict(recipe.about),
                "cost": costs.get(name),
            }
        )
    return rows


def _show_recipes(console: Console, rows: list[dict[str, Any]]) -> None:
    """A table for each folder; less of it where the terminal is narrow."""
    wide = console.width >= 110
    headings = ["recipe", "row", "form", "published", "FLOPs*", "bytes*", "heads*", "PFLOP"]
    shown = headings if wide else ["recipe", "published", "FLOPs*", "bytes*"]
    folders = sorted({row["name"].rpartition("/")[0] for row in rows})
    for folder in folders:
        members = [row for row in rows if row["name"].rpartition("/")[0] == folder]
        papers = list(dict.fromkeys(row["paper"] for row in members if row["paper"]))
        if papers:
            console.print(f"{folder}: {'; '.join(papers)}", style="bold")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for name in shown:
            left = name in ("recipe", "row", "form", "published")
            table.add_column(name, justify="left" if left else "right", no_wrap=name == "recipe" or not left)
        for row in members:
            cells = {"recipe": row["name"], "published": row["published"] or "-", **_relative(row["cost"])}
            cells["form"] = row["form"].replace("reconstruction", "rebuilt") or "-"
            cells["row"], paper = row["table"] or row["notes"], row["paper"].partition(",")[0]
            if len(papers) > 1 and not cells["row"].startswith(paper):
                cells["row"] = f"{paper}: {cells['row']}"
            table.add_row(*(cells[name] for name in shown))
        console.print(table)
    remarks = "* FLOPs and bytes (activations) of a training step, as ratios to end-to-end training of the same network"
    remarks += "; heads: parameters trained besides the model's, as a ratio to these" * wide
    remarks += "; PFLOP: of the whole run, of text a million tokens" * wide
    remarks += "; form: the release's, the paper's, or rebuilt from what is known" * wide
    console.print(remarks + ". Notes, evidence and everything else: --json", style="dim")


def _relative(cost: dict[str, Any] | None) -> dict[str, str]:
    """The cells that say what a recipe costs."""
    if cost is None:
        return dict.fromkeys(("FLOPs*", "bytes*", "heads*", "PFLOP"), "-")
    pflops = cost["pflops"]
    return {
        "FLOPs*": f"{cost['flops'] / cost['e2e_flops']:.2f}",
        "bytes*": f"{cost['activation_bytes'] / cost['e2e_activation_bytes']:.2f}",
        "heads*": f"{cost['auxiliary_parameters'] / cost['parameters']:.2f}",
        "PFLOP": f"{pflops:,.0f}" if pflops >= 100 else f"{pflops:.3g}" if pflops >= 0.01 else "<0.01",
    }


def _data(_: str | None) -> list[dict[str, Any]]:
    from localgrad import data
    from localgrad.data.paths import FORMS

    return [
        {"name": found.name, "title": found.title, "found": "yes" if found.found else "no", "where": str(found.where)}
        for found in data.available()
    ] + [
        {"name": f"{prefix}:PATH", "title": "a folder of your own", "found": "-", "where": f"PATH holds {holds}"}
        for prefix, (holds, _) in FORMS.items()
    ]
