"""What a method is made from, checked before it is made: a base takes a task, a plug-in takes a method."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from localgrad.errors import MethodError
from localgrad.method import Method
from localgrad.task import Task

Options = ParamSpec("Options")


def base(function: Callable[Concatenate[Task, Options], Method]) -> Callable[Concatenate[Task, Options], Method]:
    """Refuse, with the line to write, whatever is no task."""
    name = function.__name__

    @functools.wraps(function)
    def checked(task: Task, *args: Options.args, **options: Options.kwargs) -> Method:
        if isinstance(task, Method) or not callable(getattr(task, "loss", None)):
            given = task.name if isinstance(task, Method) else repr(task)
            raise MethodError(
                f"{name}({given}): {name} is a base and takes a task; write {name}(tasks.classification(10)) from "
                "localgrad.tasks"
            )
        return function(task, *args, **options)

    return checked  # type: ignore[return-value]  # parameters keep their names


def plugin(function: Callable[Concatenate[Method, Options], Method]) -> Callable[Concatenate[Method, Options], Method]:
    """Refuse whatever is no method, or has the plug-in already."""
    return _checked(function, repeats=False)


def repeatable(
    function: Callable[Concatenate[Method, Options], Method],
) -> Callable[Concatenate[Method, Options], Method]:
    """As `plugin`, for one that may be applied several times."""
    return _checked(function, repeats=True)


def _checked(
    function: Callable[Concatenate[Method, Options], Method], repeats: bool
) -> Callable[Concatenate[Method, Options], Method]:
    name = function.__name__

    @functools.wraps(function)
    def checked(base: Method, *args: Options.args, **options: Options.kwargs) -> Method:
        if not isinstance(base, Method):
            raise MethodError(
                f"{name}({base!r}): {name} is a plug-in and takes a method; write {name}(dgl(task)), or another base"
            )
        if not repeats and re.search(rf"\b{name}\(", base.name):
            raise MethodError(f"{name}({base.name}): {name} is part of it already; give it once, with all its options")
        return function(base, *args, **options)

    return checked  # type: ignore[return-value]  # parameters keep their names
