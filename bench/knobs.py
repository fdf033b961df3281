"""What a user can set: options of methods, settings of a run, options of commands.

python bench/knobs.py
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import typer

import localgrad
from localgrad.cli import app
from localgrad.config import About, Config


def method_options() -> Iterator[str]:
    """Parameters of every exported method besides its task or base."""
    for name in localgrad.methods.__all__:
        for option in list(inspect.signature(getattr(localgrad.methods, name)).parameters)[1:]:
            yield f"{name}.{option}"


def settings(kind: Any = Config, path: str = "") -> Iterator[str]:
    """Fields of the configuration that hold no further ones; where a recipe comes from sets nothing."""
    for field in dataclasses.fields(kind):
        inner = field.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            if inner is not About:
                yield from settings(inner, f"{path}{field.name}.")
        else:
            yield path + field.name


def command_parameters() -> Iterator[str]:
    """Arguments and options of every command."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for one in getattr(command, "commands", {"": command}).values():
            for parameter in one.params:
                if parameter.name != "help":
                    yield f"{name} {one.name if one is not command else ''} {parameter.name}"


if __name__ == "__main__":
    total = 0
    for title, found in (
        ("method options", list(method_options())),
        ("settings", list(settings())),
        ("command parameters", list(command_parameters())),
    ):
        total += len(found)
        print(f"{title}: {len(found)}\n  {', '.join(found)}")
    print(f"together: {total}")
