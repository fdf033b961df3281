"""The model's own modules that follow a cut, as what copies of them are made from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from localgrad.errors import MethodError
from localgrad.forward import Arguments, tensors_in
from localgrad.layout import Layout

_PLAIN = (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
_present: ContextVar[Arguments | None] = ContextVar("localgrad_arguments", default=None)


@contextlib.contextmanager
def called_as(arguments: Arguments) -> Iterator[None]:
    """Inside it, copies of units are called with what the module at the cut is about to get in this forward."""
    token = _present.set(arguments)
    try:
        yield
    finally:
        _present.reset(token)


@dataclass(frozen=True)
class Unit:
    """One of the model's own modules that run after a boundary, with the layouts of what it reads and returns.

    Args:
        reads_taps: whether it reads earlier features besides those at its own beginning.
        whole: whether the module makes all of what the next unit reads; branches that are joined later do not.
    """

    name: str
    module: nn.Module
    reads: Layout
    returns: Layout
    reads_taps: bool = False
    whole: bool = True

    @property
    def changes_form(self) -> bool:
        """Whether it begins a stage: another width or resolution leaves it than enters it."""
        return self.reads != self.returns


Key = int | str


class Called(nn.Module):
    """A module that takes more than the features, called as the original is in this forward; returns the features only.

    Masks, position embeddings and the like are those that the module at the cut gets, by the same place or name;
    numbers and flags are those of the example. A key-value cache is left out.

    Args:
        module: a module of the model.
        features: where it takes the features: a position, or a keyword.
        others: its other arguments in the example, by position or keyword; tensors are looked up anew in each forward.
    """

    def __init__(self, module: nn.Module, features: Key, others: Mapping[Key, Any]) -> None:
        super().__init__()
        self.module, self.features, self.others = module, features, dict(others)

    def forward(self, features: Tensor) -> Tensor:
        present = _present.get()
        args: dict[int, Any] = {}
        kwargs: dict[str, Any] = {}
        for key, value in {**self.others, self.features: features}.items():
            if key != self.features and tensors_in(value):
                value = _looked_up(key, present, value)
            if isinstance(key, int):
                args[key] = value
            else:
                kwargs[key] = value
        result = self.module(*(args[place] for place in sorted(args)), **kwargs)
        return next(value for value in tree_leaves(result) if isinstance(value, Tensor))


def _looked_up(key: Key, present: Arguments | None, example: Any) -> Any:
    """What the module at the cut gets at ``key`` in this forward; what it got in the example while nothing runs."""
    if present is None:
        return example
    given = present.kwargs.get(key) if isinstance(key, str) else present.args[key] if key < len(present.args) else None
    if not tensors_in(given):
        raise MethodError(
            f"a copy of a later unit needs the tensor it gets as {key!r}, which the module at the cut does not get in "
            "this forward; cut elsewhere, or use a method without bridges"
        )
    return tree_map_only(Tensor, Tensor.detach, given)


def others_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], features: Key) -> dict[Key, Any]:
    """The arguments besides the features that a copy has to be called with; tensors keep no graph."""
    given: dict[Key, Any] = {**dict(enumerate(args)), **kwargs}
    plain = {k: v for k, v in given.items() if k != features and all(isinstance(x, _PLAIN) for x in tree_leaves(v))}
    return {key: tree_map_only(Tensor, Tensor.detach, value) for key, value in plain.items() if value is not None}
