"""What a module reads besides arguments and parameters: noted before a forward, put back for another one."""

from __future__ import annotations

import collections
import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Batch normalisation moves its statistics, which are smaller than that, without a word to autograd's version counters.
SMALL = 1 << 14

Place = tuple[nn.Module, bool, str]  # module, whether among its buffers, name

_OF_TORCH = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
_ABSENT: Any = object()
_CONTAINERS = (list, dict, set, collections.deque, collections.OrderedDict, collections.defaultdict)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


class State:
    """Buffers and attributes of a module as they are now, and the generators of ``random`` and ``numpy.random``.

    Attributes are whatever its forward may set: counters, tensors, generators, lists, dictionaries and sets (these with
    the objects in them, not what lies inside those). What hides elsewhere is not noted: globals, variables of a
    closure, the inside of other objects.

    Args:
        module: whose.
        owner: a module whose buffers it may read too.
    """

    def __init__(self, module: nn.Module, owner: nn.Module | None = None) -> None:
        self.module, self.owner = module, owner
        self.generators: tuple[Any, Any] = random.getstate(), np.random.get_state()
        copies: dict[int, Any] = {}
        self._now = [(place, v, getattr(v, "_version", 0), _copied(v, copies)) for place, v in places(module, owner)]
        self.values = {place: copied for place, _, _, copied in self._now}

    def forget_unchanged(self) -> None:
        """After a forward: keep what it changed only; what it added was not there."""
        now = dict(places(self.module, self.owner))
        kept = {
            place: copied
            for place, value, version, copied in self._now
            if now.get(place, _ABSENT) is not value or _moved(value, version, copied)
        }
        self.values = kept | {place: _ABSENT for place in now if place not in self.values}
        self._now = []


def places(module: nn.Module, owner: nn.Module | None = None) -> Iterator[tuple[Place, Any]]:
    """Everything that `State` notes, and where it is."""
    for each in module.modules():
        for name, value in vars(each).items():
            if name not in _OF_TORCH:
                yield (each, False, name), value
    for each in dict.fromkeys((*module.modules(), *(owner.modules() if owner is not None else ()))):
        for name, value in each._buffers.items():
            yield (each, True, name), value


class StateKept(contextlib.AbstractContextManager[None]):
    """Inside it a module begins from a state, and leaves no trace: BatchNorm statistics move once a step.

    May be entered again: a block that several spans go back through is recomputed for each.

    Args:
        module: whose state.
        before: what to begin from; by default what is there.
    """

    def __init__(self, module: nn.Module, before: State | None = None) -> None:
        self.module, self.before = module, before
        self.left: dict[Place, Any] = {}
        self.hooks = 0
        self.generators: tuple[Any, Any] | None = None

    def __enter__(self) -> None:
        self.hooks = _hooks(self.module)
        self.generators = random.getstate(), np.random.get_state()
        before = State(self.module) if self.before is None else self.before
        _set_generators(before.generators)
        copies: dict[int, Any] = {}
        for place, value in before.values.items():
            self.left[place] = _exchanged(place, _copied(value, copies))

    def __exit__(self, *exception: object) -> None:
        # Hooks that a model registers in its first forward stay, and so does what tells it that it has.
        if self.before is None and _hooks(self.module) == self.hooks:
            self.left |= {place: _ABSENT for place, _ in places(self.module) if place not in self.left}
        for place, value in self.left.items():
            _exchanged(place, value)
        self.left = {}
        assert self.generators is not None
        _set_generators(self.generators)


def _hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


def _exchanged(place: Place, value: Any) -> Any:
    """Put ``value`` there; returns what was there."""
    module, buffer, name = place
    holder: Any = module._buffers if buffer else vars(module)
    old = holder.get(name, _ABSENT)
    if value is not _ABSENT:
        holder[name] = value
    elif old is not _ABSENT:
        del holder[name]
    return old


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of what may be changed in place, the same one for the same object; anything else as it is."""
    if id(value) not in copies:
        copies[id(value)] = _copy(value)
    return copies[id(value)]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.clone()
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if isinstance(value, _GENERATORS):
        return copy.deepcopy(value)
    return copy.copy(value) if type(value) in _CONTAINERS else value


def _moved(value: Any, version: int, copied: Any) -> bool:
    if isinstance(value, Tensor):
        return value._version != version or value.numel() <= SMALL
    if type(value) not in _CONTAINERS:
        return copied is not value  # a generator: what it will draw is not looked at
    pairs = zip(_entries(value), _entries(copied), strict=False)
    return len(value) != len(copied) or any(a is not b for a, b in pairs)


def _entries(container: Any) -> Iterator[Any]:
    yield from container
    if isinstance(container, dict):
        yield from container.values()


def _set_generators(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
