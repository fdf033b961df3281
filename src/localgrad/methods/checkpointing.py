"""Activation checkpointing: of blocks, of auxiliary networks, of what is cheap to compute again."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, get_args

from localgrad.errors import MethodError, nearest
from localgrad.method import Method
from localgrad.methods.composition import repeatable

Where = Literal["blocks", "selective", "auxiliary", "pointwise"]


@repeatable
def checkpointing(base: Method, *, where: Where = "blocks", first: int | None = None) -> Method:
    """Keep only boundary features of blocks that a wider span covers, and run them again in the backward pass.

    The last block of a span is never run twice: its backward pass comes at once. Random draws are repeated and
    BatchNorm statistics move once, so gradients equal the base method's.

    What runs again begins from the state that it had the first time, see `localgrad.state.State`. Nobody can see state
    elsewhere: in a global, in a variable of a closure, inside an object. A forward that moves such state, or whose
    kernels add in any order, gets the gradients of what it computed the second time, as under
    ``torch.utils.checkpoint``; so does a region that the model checkpoints itself with ``preserve_rng_state=False``.

    Blocks that run again are separate modules, made by torch.fx: `localgrad.localize` says where a model does not allow
    it. Where the model checkpoints by itself (timm's ``set_grad_checkpointing``) nothing of this is needed.

    ``selective`` is ``blocks`` by operation: what convolutions, products and attention return is kept, and only the
    rest of these blocks runs again.

    In auxiliary networks each copied unit of a bridge and each head is a part: only one of them is alive at a time.

    ``pointwise`` keeps convolutions, products and attention, and computes again what normalisations and activation
    functions return: a fifth less for a ResNet, a third for a transformer, in nearly the same time. It helps every
    span, one-block ones included, and stacks: ``checkpointing(checkpointing(base), where="pointwise")``.

    Args:
        base: a method with spans wider than one block for ``blocks``, with auxiliary heads for ``auxiliary``.
        where: what is recomputed: ``blocks``, ``selective`` (blocks, but for their products), parts of ``auxiliary``
            networks, or ``pointwise`` operations.
        first: with ``pointwise``, only so many blocks at the beginning and their heads, for a method that needs the
            most memory there; None for all.

    Raises:
        MethodError: for an unknown place, if there are no auxiliary networks, or for ``first`` below 1 or without
            ``pointwise``.

    Example:
        >>> import localgrad
        >>> localgrad.methods.checkpointing(localgrad.methods.e2e(localgrad.tasks.classification(10))).name
        'checkpointing(e2e)'

    Source: Chen et al., 2016, arXiv:1604.06174, through ``torch.utils.checkpoint``; ``selective`` is its
    ``create_selective_checkpoint_contexts``; ``pointwise`` is what they propose
    for convolution, BatchNorm and activation, done tensor by tensor (`localgrad.recompute.pointwise`).
    """
    if where not in get_args(Where):
        raise MethodError(nearest(where, get_args(Where), "where"))
    if where == "auxiliary":
        base.require_heads("checkpointing")
    if first is not None and (where != "pointwise" or first < 1):
        raise MethodError(f"first={first} with where={where!r}: write where='pointwise' and first=1 or more, or None")
    value: Any = (first or math.inf) if where == "pointwise" else True
    changes: dict[str, Any] = {"blocks": True, "selective": True} if where == "selective" else {where: value}
    return replace(base, name=f"checkpointing({base.name})", recompute=replace(base.recompute, **changes))
