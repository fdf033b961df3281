"""Where a forward is suspended, what is looked at there, and what it is about to call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from localgrad.suspension.frames import Tag


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
class Opening:
    """Points and a watch, found on the modules of one model.

    Attributes:
        points: where blocks 1 .. K-1 begin, in the order they run.
        watched: the modules whose inputs and outputs are looked at, with their names.
        frames: whether local variables are looked at.
        device_type: of the parameters.
        training: whether gradients are recorded.
    """

    points: Sequence[tuple[nn.Module, Point]]
    watched: Mapping[nn.Module, str]
    frames: bool
    device_type: str
    training: bool


@dataclass(frozen=True)
class Arguments:
    """What the module at a cut is about to be called with, in this forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
