"""Activation checkpointing that starts from the same state the second time, and leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from localgrad.randomness import repeats_draws
from localgrad.state import State, StateKept

_ATEN = torch.ops.aten
PRODUCTS = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
]


@dataclass(frozen=True)
class Recompute:
    """What runs again in the backward pass instead of being kept.

    Args:
        blocks: blocks whose activations would have to wait for a later block's backward pass.
        selective: of these blocks keep what convolutions, products and attention return (`PRODUCTS`).
        auxiliary: each part of a bridge and each head, so that one of them is alive at a time.
        pointwise: what normalisations and activation functions return, in so many blocks at the beginning and their
            heads; ``math.inf`` for all.
    """

    blocks: bool = False
    selective: bool = False
    auxiliary: bool = False
    pointwise: float = 0


def recomputed(module: nn.Module, *arguments: Any, owner: nn.Module | None = None, selective: bool = False) -> Any:
    """``module(*arguments)``, run again in the backward pass instead of kept; draws are repeated.

    The second time it starts from the `localgrad.state.State` that it had before the first, with buffers of ``owner``
    which it may read, and leaves no trace. Torch's own draws are repeated by `torch.utils.checkpoint.checkpoint`.
    ``selective`` keeps what the operations in `PRODUCTS` return; they do not run again.
    """

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        before = State(module, owner)
        first, again = _then_forgotten(before), StateKept(module, before)
        if not selective:
            return first, again
        keep, find = create_selective_checkpoint_contexts(PRODUCTS)
        return _both(first, keep), _both(again, find)

    return checkpoint(module, *arguments, use_reentrant=False, context_fn=contexts, preserve_rng_state=repeats_draws())


@contextlib.contextmanager
def _then_forgotten(before: State) -> Iterator[None]:
    yield
    before.forget_unchanged()


@contextlib.contextmanager
def _both(
    outer: contextlib.AbstractContextManager[Any], inner: contextlib.AbstractContextManager[Any]
) -> Iterator[None]:
    with outer, inner:
        yield


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
