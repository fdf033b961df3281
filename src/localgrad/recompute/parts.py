"""Activation checkpointing that starts from the same state the second time, and leaves no trace."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Recompute:
    """What runs again in the backward pass instead of being kept.

    Args:
        blocks: blocks whose activations would have to wait for a later block's backward pass.
        auxiliary: each part of a bridge and each head, so that one of them is alive at a time.
        pointwise: what normalisations and activation functions return, in so many blocks at the beginning and their
            heads; ``math.inf`` for all.
    """

    blocks: bool = False
    auxiliary: bool = False
    pointwise: float = 0


@dataclass
class Before:
    """What a module read, besides its arguments, in its first forward: buffers that it moved, generators of draws.

    Torch's own draws are repeated by `torch.utils.checkpoint.checkpoint`.
    """

    buffers: dict[tuple[nn.Module, str], Tensor] = field(default_factory=dict)
    generators: tuple[Any, Any] | None = None

    @contextlib.contextmanager
    def noted(self, module: nn.Module) -> Iterator[None]:
        """Around the first forward: copies every buffer, and lets go of the copies of those that did not move."""
        self.generators = random.getstate(), numpy.random.get_state()
        owned = [(m, name, b, b._version, b.clone()) for m, name, b in _buffers(module)]
        yield
        for m, name, buffer, version, old in owned:
            if m._buffers.get(name) is not buffer or buffer._version != version:
                self.buffers[m, name] = old


class BuffersKept(contextlib.AbstractContextManager[None]):
    """Inside it a module moves copies of its buffers, so that BatchNorm statistics move once a step.

    May be entered again: a block that several spans go back through is recomputed for each.

    Args:
        module: whose buffers.
        before: what to begin from; by default what is there.
    """

    def __init__(self, module: nn.Module, before: Before | None = None) -> None:
        self.module, self.before = module, Before() if before is None else before
        self.owned: list[tuple[nn.Module, str, Tensor]] = []
        self.generators: tuple[Any, Any] | None = None

    def __enter__(self) -> None:
        self.owned = _buffers(self.module)
        for module, name, buffer in self.owned:
            module._buffers[name] = self.before.buffers.get((module, name), buffer).clone()
        if self.before.generators is not None:
            self.generators = random.getstate(), numpy.random.get_state()
            _set_generators(self.before.generators)

    def __exit__(self, *exception: object) -> None:
        for module, name, buffer in self.owned:
            module._buffers[name] = buffer
        self.owned = []
        if self.generators is not None:
            _set_generators(self.generators)


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [(m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]


def _set_generators(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    numpy.random.set_state(states[1])


def recomputed(module: nn.Module, *arguments: Any, owner: nn.Module | None = None) -> Any:
    """``module(*arguments)``, run again in the backward pass instead of kept; draws are repeated.

    The second time it starts from what buffers of ``owner``, by default of the module, were before the first, and
    leaves them as they are then; see `Before`.
    """

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        before, whose = Before(), owner or module
        return before.noted(whose), BuffersKept(whose, before)

    return checkpoint(module, *arguments, use_reentrant=False, context_fn=contexts)


class Recomputed(nn.Module):
    """A module that is run again in the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: Tensor) -> Any:
        return recomputed(self.module, features) if torch.is_grad_enabled() else self.module(features)


class Parts(nn.Sequential):
    """Modules that run one behind the other and may be recomputed one by one."""


def recompute_parts(module: nn.Module) -> None:
    """Let each part of ``module`` be recomputed by itself: a child, or the parts that a child consists of."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) or any(isinstance(inner, Parts) for inner in child.modules()):
            recompute_parts(child)
        elif any(True for _ in child.parameters()):
            setattr(module, name, Recomputed(child))
