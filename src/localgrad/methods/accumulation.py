"""Gradient accumulation over micro-batches."""

from __future__ import annotations

from dataclasses import replace

from localgrad.errors import MethodError
from localgrad.method import Method


def accumulation(base: Method, *, parts: int = 4) -> Method:
    """Run each batch in ``parts`` micro-batches and add up their gradients, weighted by their share of the samples.

    Gradients equal the base method's where no layer or loss looks across samples; BatchNorm normalises by micro-batch
    and moves its statistics ``parts`` times.

    Args:
        base: any method.
        parts: micro-batches per batch.

    Raises:
        MethodError: for fewer than 1 part.

    Example:
        >>> import localgrad
        >>> base = localgrad.methods.dgl(localgrad.tasks.classification(10))
        >>> localgrad.methods.accumulation(base, parts=2).micro_batches
        2
    """
    if parts < 1:
        raise MethodError(f"parts={parts}; accumulation needs at least 1 micro-batch")
    return replace(base, name=f"accumulation({base.name})", micro_batches=base.micro_batches * parts)
