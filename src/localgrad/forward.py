"""The model's own forward, suspended at the cuts.

One call of the model runs in a greenlet, which is a call stack of its own in the caller's thread::

    caller (engine)                        forward (the model's code)
    proceed() ---------------------------> model(*inputs) ... block 0 ... the module at cut 1 is called
              <--- features, arguments --- suspended before it begins
    loss, backward, step of block 0
    proceed() ---------------------------> that module runs ... block 1 ... cut 2
              <---------------------------

So hooks, activation checkpointing, autocast, branches, draws, masks and keyword arguments work as in plain training,
because it is plain training. The cut is taken in ``Module.__call__``, outside the module's own hooks and outside what
``Module.compile`` compiled; what is put there lives only while a step runs, and no copy or pickle of a model has it.
"""

from __future__ import annotations

import contextvars
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localgrad.batches import tensors_in
from localgrad.errors import PartitionError
from localgrad.suspension import thread_state
from localgrad.suspension.doors import Suspended
from localgrad.suspension.frames import Tag, depth_of, held_by_frames
from localgrad.suspension.points import Arguments, Opening, Point


class SuspendedForward(Suspended):
    """One call of a model.

    Attributes:
        boundary: where it is suspended; the number of blocks once it has ended.
        features: of the module that begins there, or what the model returned.
        arguments: of that module.
        autocast: whether the forward was under autocast there, and to which dtype.
        hooked: whether it was suspended under saved-tensor hooks, inside a checkpointed region most likely.
    """

    def __init__(self, opening: Opening, call: Callable[[], Any]) -> None:
        super().__init__(call)
        self._opening, self.training = opening, opening.training
        self._calls: dict[nn.Module, int] = {}
        self._made: list[tuple[Tag, weakref.ref[Tensor]]] = []
        self._base: thread_state.Heights | None = None
        self._inference = False
        self._closing = False
        self.boundary = 0
        self.features: Any = None
        self.arguments = Arguments((), {})
        self.autocast: tuple[bool, torch.dtype] = (False, torch.float32)
        self.hooked = False
        self.gr_context = contextvars.copy_context()  # what the forward sets in context variables stays its own

    def proceed(self, error: type[BaseException] | None = None) -> None:
        """Run the forward to the next cut, or to its end."""
        self.parent = greenlet.getcurrent()
        callers, self._base = thread_state.values(), thread_state.heights()
        self._inference = torch.is_inference_mode_enabled()
        self.features, self.arguments = None, Arguments((), {})
        try:
            output = self.switch() if error is None else self.throw(error)
        finally:
            thread_state.set_values(callers)
        if self.dead:
            self.boundary, self.features, self.autocast = len(self._opening.points) + 1, output, (False, torch.float32)
            self.hooked = False

    def made(self, known: Callable[[Tensor], bool]) -> dict[int, tuple[Tag, Tensor]]:
        """What has been made since the last cut and is still held, each tensor once.

        Under the tag of the outermost module that returned or took it: what lies inside may get compiled.
        """
        found: dict[int, tuple[Tag, Tensor]] = {}
        for tag, ref in self._made:
            if (tensor := ref()) is not None and tensor.grad_fn is not None and not known(tensor):
                before = found.get(id(tensor))
                if before is None or depth_of(tag) < depth_of(before[0]):
                    found[id(tensor)] = (tag, tensor)
        self._made = []
        for place, tensor in enumerate(tensors_in(self.features)):
            if tensor.grad_fn is not None and not known(tensor):
                found.setdefault(id(tensor), (("features", str(place)), tensor))
        return found

    def _saw(self, kind: str, module: nn.Module, values: Any) -> None:
        """A module takes or returns ``values``."""
        if (name := self._opening.watched.get(module)) is not None:
            self._made += [
                ((kind, name, str(place)), weakref.ref(tensor))
                for place, tensor in enumerate(tensors_in(values))
                if tensor.grad_fn is not None
            ]

    def left(self, module: nn.Module, output: Any) -> None:
        """See `localgrad.suspension.doors.Suspended`."""
        self._saw("returns", module, output)

    def arrived(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``module`` is about to run, inside this forward; suspended if a cut lies here."""
        self._saw("takes", module, (args, kwargs))
        number = self._calls[module] = self._calls.get(module, -1) + 1
        later = enumerate(self._opening.points[self.boundary :], start=self.boundary + 1)
        boundary = next((b for b, (other, point) in later if other is module and point.call == number), None)
        if boundary is None:
            return
        if self._closing:
            raise greenlet.GreenletExit
        point = self._opening.points[boundary - 1][1]
        features = _leaf(tree_leaves((args, kwargs)), point)
        if self._opening.training and not torch.is_grad_enabled():
            raise PartitionError(
                f"the forward runs {point.name!r}, with which a block begins, under torch.no_grad(), or under "
                "torch.utils.checkpoint with use_reentrant=True. Cut elsewhere, or write use_reentrant=False"
            )
        if torch.is_inference_mode_enabled() and not self._inference:
            raise PartitionError(
                f"the forward runs {point.name!r}, with which a block begins, under torch.inference_mode(), which "
                "cannot be set aside: write torch.no_grad() there, or cut elsewhere"
            )
        if self._opening.frames:
            self._made += [(tag, weakref.ref(tensor)) for tag, tensor in held_by_frames(sys._getframe(2))]
        self.boundary, self.features, self.arguments = boundary, features, Arguments(args, kwargs)
        self._suspend()

    def _suspend(self) -> None:
        assert self._base is not None and self.parent is not None
        own = thread_state.values()
        device = self._opening.device_type
        if torch.amp.is_autocast_available(device):  # on meta, where models are planned, there is none
            self.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        stacked = thread_state.lift_off(self._base)
        self.hooked = bool(stacked.hooks)
        try:
            self.parent.switch()
        finally:
            thread_state.put_on(stacked)
            thread_state.set_values(own)

    def close(self) -> None:
        """Leave the ``with`` and ``finally`` blocks of the forward now; again where the model catches everything."""
        self._closing = True
        self._made = []
        while self and not sys.is_finalizing():
            self.proceed(greenlet.GreenletExit)
        self.features, self.arguments = None, Arguments((), {})


def _leaf(leaves: Sequence[Any], point: Point) -> Tensor:
    features = leaves[point.leaf] if point.leaf < len(leaves) else None
    if not isinstance(features, Tensor):
        raise PartitionError(
            f"a block begins with {point.name!r}, whose argument {point.leaf} was a tensor when the model was cut and "
            f"is now {'missing' if features is None else f'a {type(features).__name__}'}; call localize with an "
            "example that is called as in training"
        )
    return features
