"""Activation checkpointing at the boundaries."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from localgrad.errors import MethodError, nearest
from localgrad.method import Method


def checkpointing(base: Method, *, where: Literal["blocks", "auxiliary", "both"] = "blocks") -> Method:
    """Keep only boundary features of blocks that a wider span covers, and run them again in the backward pass.

    The last block of a span is never run twice: its backward pass comes at once. Random draws are repeated and
    BatchNorm statistics move once, so gradients equal the base method's.

    In auxiliary networks each copied unit of a bridge and each head is a part: only one of them is alive at a time.

    Args:
        base: a method with spans wider than one block for ``blocks``, with auxiliary heads for ``auxiliary``.
        where: what is recomputed: ``blocks``, the parts of ``auxiliary`` networks, or ``both``.

    Raises:
        MethodError: for an unknown place, or if there are no auxiliary networks.

    Example:
        >>> import localgrad
        >>> localgrad.methods.checkpointing(localgrad.methods.e2e(localgrad.tasks.classification(10))).name
        'checkpointing(e2e)'

    Source: Chen et al., 2016, arXiv:1604.06174, through ``torch.utils.checkpoint``.
    """
    if where not in ("blocks", "auxiliary", "both"):
        raise MethodError(nearest(where, ("blocks", "auxiliary", "both"), "where"))
    if where != "blocks":
        base.require_heads("checkpointing")
    return replace(
        base,
        name=f"checkpointing({base.name})",
        checkpoint=base.checkpoint or where != "auxiliary",
        checkpoint_auxiliary=base.checkpoint_auxiliary or where != "blocks",
    )
