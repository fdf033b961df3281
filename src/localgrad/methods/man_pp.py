"""Momentum auxiliary network with a learnable scaling bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from localgrad import bridges
from localgrad.method import Method
from localgrad.twins import Buffers, When


def man_pp(
    base: Method,
    *,
    decay: float = 0.995,
    depth: int = 1,
    twin_init: Literal["source", "fresh"] = "source",
    companion_init: Literal["source", "fresh"] = "fresh",
    exchange: When = "after",
    buffers: Buffers = "none",
    borders: int = 1,
) -> Method:
    """As MAN, the two branches weighted by a learnable scalar per boundary.

    ``heads read s * companion(h) + (2 - s) * twin(h)``, s starting at 1.

    Args:
        base: a method with auxiliary heads.
        decay: of the moving average.
        depth: units looked through; 2 for vision transformers in the released code.
        twin_init, companion_init, exchange, buffers, borders: see `localgrad.methods.man`.

    Raises:
        MethodError: if the base has no auxiliary heads, or for a value out of range.

    Example:
        >>> import localgrad
        >>> localgrad.methods.man_pp(localgrad.methods.dgl(localgrad.tasks.classification(10)), depth=2).name
        'man_pp(dgl)'

    Source: MAN++, TPAMI 2026, arXiv:2507.16279, and its released code.
    Differs: as `localgrad.methods.man`.
    """
    base.require_heads("man_pp")
    momentum = bridges.Momentum(decay, "scaled", depth, twin_init, companion_init, exchange, buffers, borders)
    return replace(base, name=f"man_pp({base.name})", bridge=bridges.chain(base.bridge, momentum))
