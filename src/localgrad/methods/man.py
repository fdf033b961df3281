"""Momentum auxiliary network."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from localgrad import bridges
from localgrad.method import Method
from localgrad.methods.composition import plugin


@plugin
def man(
    base: Method,
    *,
    decay: float = 0.995,
    mix: Literal["sum", "ema", "learnable", "pair"] = "sum",
    depth: int = 1,
    released: bool = False,
) -> Method:
    """Auxiliary heads look through the next unit of the network: a momentum twin of it plus a learnable companion.

    ``heads read companion(h) + twin(h)``, ``twin <- decay * twin + (1 - decay) * next unit`` after each optimizer step.
    Parameters cross the boundary, gradients do not.

    Args:
        base: a method with auxiliary heads.
        decay: of the moving average.
        mix: ``sum``; for the ablation ``ema`` or ``learnable`` keep one of the two, ``pair`` has two learnable units.
        depth: units looked through; those after the first are learnable.
        released: as the released code: the twin starts at weights of its own, and the moving average runs before the
            optimizer step. `localgrad.bridges.Momentum` has these choices one by one.

    Raises:
        MethodError: if the base has no auxiliary heads, or for a value out of range.

    Example:
        >>> import localgrad
        >>> localgrad.methods.man(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'man(dgl)'

    Source: Su et al., Momentum Auxiliary Network, ECCV 2024, arXiv:2407.05623, and its released CIFAR code.
    Differs: the moving average runs after the optimizer step and starts at the source; ``released=True`` undoes both.
    """
    base.require_heads("man")
    momentum = bridges.Momentum(decay, mix, depth, **bridges.released(released))
    return replace(base, name=f"man({base.name})", bridge=bridges.chain(base.bridge, momentum))
