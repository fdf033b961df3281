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
import torch
import torch.utils.checkpoint
from torch import nn

from localgrad.errors import PartitionError


class Suspended(greenlet.greenlet):  # type: ignore[misc]  # it has no types
    """A forward that can be suspended; see `localgrad.forward.SuspendedForward`."""

    training: bool
    boundary: int

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


def refuse_reentrant() -> Callable[[], None]:
    """Refuse, in a suspended forward, what torch only warns of: that a checkpointed region will get no gradient.

    Returns what ends it.
    """
    _watched.append(True)
    torch.utils.checkpoint.check_backward_validity = _check_reentrant

    def remove() -> None:
        _watched.pop()
        if not _watched:
            torch.utils.checkpoint.check_backward_validity = _warn

    return remove


_watched: list[bool] = []  # one for each step under way
_warn = torch.utils.checkpoint.check_backward_validity


def _check_reentrant(inputs: Any) -> None:
    forward = greenlet.getcurrent()
    cut = isinstance(forward, Suspended) and forward.training and forward.boundary > 0
    if cut and not any(value.requires_grad for value in inputs if isinstance(value, torch.Tensor)):
        raise PartitionError(
            "a region under torch.utils.checkpoint with use_reentrant=True takes features that were cut from their "
            "graph, and would train nothing: write use_reentrant=False, or switch it on before localize"
        )
    _warn(inputs)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    impl = module.__dict__.get("_compiled_call_impl")
    return (impl.compiled if isinstance(impl, _Door) else impl) is not None


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
