"""Momentum auxiliary network with a learnable scaling bias."""

from __future__ import annotations

from dataclasses import replace

from localgrad import bridges
from localgrad.method import Method
from localgrad.methods.composition import plugin


@plugin
def man_pp(base: Method, *, decay: float = 0.995, depth: int = 1, released: bool = False) -> Method:
    """As MAN, the two branches weighted by a learnable scalar per boundary.

    ``heads read s * companion(h) + (2 - s) * twin(h)``, s starting at 1.

    Args:
        base: a method with auxiliary heads.
        decay: of the moving average.
        depth: units looked through; 2 for vision transformers in the released code.
        released: as the released code: the twin starts at weights of its own, and the moving average runs before the
            optimizer step.

    Raises:
        MethodError: if the base has no auxiliary heads, or for a value out of range.

    Example:
        >>> import localgrad
        >>> localgrad.methods.man_pp(localgrad.methods.dgl(localgrad.tasks.classification(10)), depth=2).name
        'man_pp(dgl)'

    Source: MAN++, TPAMI 2026, arXiv:2507.16279, and its released code.
    Differs: the moving average runs after the optimizer step and starts at the source; ``released=True`` undoes both.
    """
    base.require_heads("man_pp")
    momentum = bridges.Momentum(decay, "scaled", depth, **bridges.released(released))
    return replace(base, name=f"man_pp({base.name})", bridge=bridges.chain(base.bridge, momentum))
