"""Arguments that several commands have, and the settings they describe."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.NAME=VALUE]...", help="Settings to change, for instance optim.lr=0.05.", show_default=False
    ),
]
Recipe = Annotated[
    str | None,
    typer.Argument(help="A recipe (see: localgrad list recipes) or the path of a YAML file.", show_default=False),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        "-m",
        help="dgl+man, inner to outer, or YAML: '[{dgl: {head: linear}}, man]'; MODULE:FUNCTION is your own.",
        show_default=False,
    ),
]
BlocksOption = Annotated[
    int | None, typer.Option("--num-blocks", "-k", help="Blocks to cut the model into.", show_default=False)
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="resnet32, timm:NAME, torchvision:NAME, or MODULE:FUNCTION of your own.", show_default=False
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", help="A data set (see: localgrad list data), a folder, or MODULE:FUNCTION.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def positional(recipe: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """Recipe and overrides; the first argument is an override too if it looks like one."""
    overrides = list(overrides or [])
    if recipe is not None and re.match(r"[\w.]+=", recipe):
        return None, [recipe, *overrides]
    return recipe, overrides


def settings_of(recipe: str | None, overrides: list[str] | None, **flags: Any) -> Any:
    """The configuration a command line describes: recipe, then SECTION.NAME=VALUE, then flags."""
    from localgrad import config
    from localgrad.recipes import merge, override, read_recipe
    from localgrad.spec import parse_method

    settings: dict[str, Any] = {} if recipe is None else read_recipe(recipe)
    settings = override(settings, overrides or [])
    changes: dict[str, Any] = {}
    for key, value in flags.items():
        if value is not None:
            section, _, name = key.partition("__")
            if name:
                changes.setdefault(section, {})[name] = value
            else:
                changes[section] = value
    if "num_blocks" in changes.get("blocks", {}):
        changes["blocks"]["cuts"] = None
    if isinstance(changes.get("method"), str):
        changes["method"] = parse_method(changes["method"])
    settings = merge(settings, changes)
    settings.setdefault("method", ["dgl"])
    found = config.validate(settings, recipe or "command line")
    from localgrad.data import full_name

    found.data.name = full_name(found.data.name)
    return found
