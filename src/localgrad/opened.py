"""A model with doors at its cuts, for the length of a step."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import greenlet
import torch
from torch import nn

from localgrad.errors import TrainingError
from localgrad.forward import SuspendedForward
from localgrad.suspension.doors import put_door, refuse_reentrant
from localgrad.suspension.frames import outermost
from localgrad.suspension.points import Opening, Point, Watch


class OpenModel:
    """A model with doors at its cuts: as a context, for the length of a step; ``call`` begins a forward.

    Args:
        model: what is called; its parts are looked up in ``root`` by name.
        points: where blocks 1 .. K-1 begin, in the order they run.
        watch: how to find what else crosses.
        device_type: of the parameters.
    """

    def __init__(
        self, model: nn.Module, root: nn.Module, points: Sequence[Point], watch: Watch, device_type: str
    ) -> None:
        self.model, self.watch = model, watch
        self.opening = Opening(
            [(root.get_submodule(point.name), point) for point in points],
            {root.get_submodule(name): name for name in watch.modules},
            watch.frames,
            device_type,
            torch.is_grad_enabled(),
        )
        self._thread = threading.current_thread()
        self._open: list[SuspendedForward] = []
        self._exits = contextlib.ExitStack()

    def call(self, inputs: Any) -> SuspendedForward:
        """A forward that has not begun."""
        forward = SuspendedForward(self.opening, lambda: outermost(self.model, inputs))
        self._open.append(forward)
        return forward

    def __enter__(self) -> OpenModel:
        for forward in _LEFT.pop(threading.current_thread(), ()):
            forward.close()
        for module in dict.fromkeys((*self.opening.watched, *(module for module, _ in self.opening.points))):
            self._exits.callback(put_door(module))
        self._exits.callback(refuse_reentrant())
        return self

    def __exit__(self, *exception: object) -> None:
        for forward in self._open:
            self._exits.callback(self._close, forward)
        self._open.clear()
        self._exits.close()  # every one of them, whatever one of them raises

    def _close(self, forward: SuspendedForward) -> None:
        try:
            forward.close()
        except (greenlet.error, ValueError) as error:
            # Closed in another thread: its own closes it with its next step; if that has ended, the forward has, too.
            if self._thread.is_alive():
                _LEFT.setdefault(self._thread, []).append(forward)
                raise TrainingError(
                    "a step is advanced or closed in another thread than the one it was begun in: run the whole loop "
                    "over local_losses in one thread"
                ) from error


# Forwards that could not be closed, by thread.
_LEFT: weakref.WeakKeyDictionary[threading.Thread, list[SuspendedForward]] = weakref.WeakKeyDictionary()
