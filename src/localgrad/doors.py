"""What is put on modules for the length of a step: doors at the cuts, and eyes where something that crosses is held.

They ask which greenlet runs: in a plain call of the model, in a head or in a recomputation they do nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import greenlet
from torch import nn


class Suspended(greenlet.greenlet):
    """A forward that can be suspended; see `localgrad.forward.SuspendedForward`."""

    @abstractmethod
    def arrived(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``module`` is about to run."""

    @abstractmethod
    def saw(self, kind: str, name: str, values: Any) -> None:
        """A watched module ``takes`` or ``returns`` values."""


class Seen:
    """A hook that tells the forward which runs, if one does, what a module takes or returns."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name

    def __call__(self, module: nn.Module, *values: Any) -> None:
        forward = greenlet.getcurrent()
        if isinstance(forward, Suspended):
            forward.saw(self.kind, self.name, values[-1] if self.kind == "returns" else values)


def put_door(module: nn.Module) -> Callable[[], None]:
    """Ask for a cut before ``module`` runs, in a forward of ours only; returns what takes the door away again.

    ``Module.__call__`` looks up ``_compiled_call_impl`` first. A pre-hook would run inside what was compiled, and after
    hooks of others, such as FSDP's, which must not have begun the next block while the last one goes back.
    """
    before = module.__dict__.get("_compiled_call_impl")
    inner = before or module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        forward = greenlet.getcurrent()
        if isinstance(forward, Suspended):
            forward.arrived(module, args, kwargs)
        return inner(*args, **kwargs)

    def remove() -> None:
        if before is None:
            module.__dict__.pop("_compiled_call_impl", None)
        else:
            module.__dict__["_compiled_call_impl"] = before

    module.__dict__["_compiled_call_impl"] = call
    return remove
