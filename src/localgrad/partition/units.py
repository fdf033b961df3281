"""The model's own modules that follow a cut, as what copies of them are made from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from localgrad.layout import Layout
from localgrad.suspension.points import Arguments

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

    Masks, position embeddings and the like are what the module at the cut gets for them; numbers and flags are those of
    the example. A key-value cache is left out.

    Args:
        module: a module of the model.
        features: where it takes the features: positions and keywords.
        others: its other arguments in the example, by position or keyword.
        sources: where the module at the cut gets each of them that holds tensors.
    """

    def __init__(
        self, module: nn.Module, features: Sequence[Key], others: Mapping[Key, Any], sources: Mapping[Key, Key]
    ) -> None:
        super().__init__()
        self.module, self.features, self.others, self.sources = module, tuple(features), dict(others), dict(sources)

    def forward(self, features: Tensor) -> Tensor:
        present = _present.get()
        given = {key: self._given(key, value, present) for key, value in self.others.items()}
        given |= dict.fromkeys(self.features, features)
        positions = sorted(key for key in given if isinstance(key, int))
        named = {key: value for key, value in given.items() if isinstance(key, str)}
        result = self.module(*(given[place] for place in positions), **named)
        return next(value for value in tree_leaves(result) if isinstance(value, Tensor))

    def _given(self, key: Key, example: Any, present: Arguments | None) -> Any:
        """An argument in this forward; as in the example while nothing runs."""
        if key not in self.sources or present is None:
            return example
        return tree_map_only(Tensor, Tensor.detach, argument(present, self.sources[key]))


def argument(arguments: Arguments, key: Key) -> Any:
    """What a module gets at a position or as a keyword."""
    if isinstance(key, str):
        return arguments.kwargs.get(key)
    return arguments.args[key] if key < len(arguments.args) else None


def others_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Key, Any]:
    """The arguments that a copy can be called with: positions are kept, objects that carry state become None."""
    given: dict[Key, Any] = {}
    pairs: list[tuple[Key, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in pairs:
        plain = all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(value))
        if isinstance(key, int) or (plain and value is not None):
            given[key] = tree_map_only(Tensor, Tensor.detach, value) if plain else None
    return given
