"""Activation checkpointing that leaves BatchNorm statistics alone the second time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

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


class BuffersKept:
    """Inside it a module moves copies of its buffers, so that BatchNorm statistics move once a step.

    May be entered again: a block that several spans go back through is recomputed for each.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.owned: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        self.owned = [(m, name, b) for m in self.module.modules() for name, b in m._buffers.items() if b is not None]
        for module, name, buffer in self.owned:
            module._buffers[name] = buffer.clone()

    def __exit__(self, *exception: object) -> None:
        for module, name, buffer in self.owned:
            module._buffers[name] = buffer
        self.owned = []


def recomputed(module: nn.Module, *arguments: Any, owner: nn.Module | None = None) -> Any:
    """``module(*arguments)``, run again in the backward pass instead of kept; draws are repeated.

    The second time the buffers of ``owner``, by default of the module, are left alone.
    """
    return checkpoint(
        module,
        *arguments,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), BuffersKept(owner or module)),
    )


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
