"""Where a forward is suspended, what is looked at there, and what it is about to call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from localgrad.frames import Tag


@dataclass(frozen=True)
class Point:
    """Where a block begins: the ``call``-th call of module ``name``; its ``leaf``-th argument are the features."""

    name: str
    call: int = 0
    leaf: int = 0


@dataclass(frozen=True)
class Watch:
    """How tensors that cross boundaries are found: modules that take or return them, and frames' local variables.

    ``last``: of what a block made and somebody holds under a tag, the last block that reads it, and how many references
    to it there are then. After that block nobody needs the data, unless there are more.
    """

    modules: tuple[str, ...] = ()
    frames: bool = False
    last: Mapping[tuple[int, Tag], tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Arguments:
    """What the module at a cut is about to be called with, in this forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
