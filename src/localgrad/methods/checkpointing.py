"""Activation checkpointing at the boundaries."""

from __future__ import annotations

from dataclasses import replace

from localgrad.method import Method


def checkpointing(base: Method) -> Method:
    """Keep only boundary features of blocks that a wider span covers, and run them again in the backward pass.

    The last block of a span is never run twice: its backward pass comes at once. Random draws are repeated and
    BatchNorm statistics move once, so gradients equal the base method's.

    Args:
        base: a method with spans wider than one block; for others it changes nothing.

    Example:
        >>> import localgrad
        >>> localgrad.methods.checkpointing(localgrad.methods.e2e(localgrad.tasks.classification(10))).name
        'checkpointing(e2e)'

    Source: Chen et al., 2016, arXiv:1604.06174, through ``torch.utils.checkpoint``.
    """
    return replace(base, name=f"checkpointing({base.name})", checkpoint=True)
