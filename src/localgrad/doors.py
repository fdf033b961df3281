"""What is put on modules for the length of a step: doors, which tell a suspended forward what goes in and out.

``Module.__call__`` looks up ``_compiled_call_impl`` first, and that is where a door stands. A pre-hook would run inside
what was compiled, and after hooks of others, such as FSDP's, which must not have begun the next block while the last
one goes back. No copy or pickle of a module has what lies there. A door asks which greenlet runs: in a plain call of
the model, in a head or in a recomputation it does nothing.
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
    def left(self, module: nn.Module, output: Any) -> None:
        """``module`` has returned ``output``."""


class _Door:
    """One for a module, however many steps are under way; ``steps`` counts them."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.steps = module, 0
        self.compiled = module.__dict__.get("_compiled_call_impl")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = self.module._call_impl if self.compiled is None else self.compiled
        forward = greenlet.getcurrent()
        if not isinstance(forward, Suspended):
            return inner(*args, **kwargs)
        forward.arrived(self.module, args, kwargs)
        output = inner(*args, **kwargs)
        forward.left(self.module, output)
        return output


def put_door(module: nn.Module) -> Callable[[], None]:
    """Put a door on ``module``; returns what takes it away again."""
    door = module.__dict__.get("_compiled_call_impl")
    if not isinstance(door, _Door):
        door = module.__dict__["_compiled_call_impl"] = _Door(module)
    door.steps += 1

    def remove() -> None:
        door.steps -= 1
        if door.steps == 0 and door.compiled is None:
            module.__dict__.pop("_compiled_call_impl", None)
        elif door.steps == 0:
            module.__dict__["_compiled_call_impl"] = door.compiled

    return remove
