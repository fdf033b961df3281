"""Auxiliary networks on pooled features."""

from __future__ import annotations

from dataclasses import replace

from localgrad import bridges
from localgrad.method import Method
from localgrad.methods.composition import plugin


@plugin
def pooled(base: Method, *, factor: int = 2) -> Method:
    """Average-pool the features before bridge and heads; ``factor ** 2`` times fewer positions to compute on.

    Plug-ins that follow add their bridges behind the pooling: ``man(pooled(dgl(task)))`` mixes pooled features.

    Args:
        base: a method with auxiliary heads.
        factor: sides of the pooling; less where the grid is smaller.

    Raises:
        MethodError: if the base has no auxiliary heads, or for a factor below 1.

    Example:
        >>> import localgrad
        >>> localgrad.methods.pooled(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'pooled(dgl)'

    Source: ours.
    """
    base.require_heads("pooled")
    return replace(base, name=f"pooled({base.name})", bridge=bridges.chain(base.bridge, bridges.Pool(factor)))
