"""Momentum auxiliary network."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from localgrad import bridges
from localgrad.errors import MethodError
from localgrad.method import Method


def man(
    base: Method,
    *,
    decay: float = 0.995,
    mix: Literal["sum", "ema", "learnable"] = "sum",
    depth: int = 1,
    twin_init: Literal["source", "fresh"] = "source",
) -> Method:
    """Auxiliary heads look through the next unit of the network: a momentum twin of it plus a learnable companion.

    ``heads read companion(h) + twin(h)``, ``twin <- decay * twin + (1 - decay) * next unit`` after each optimizer step.
    Parameters cross the boundary, gradients do not.

    Args:
        base: a method with auxiliary heads.
        decay: of the moving average.
        mix: ``sum``; ``ema`` or ``learnable`` keep one of the two, for the ablation.
        depth: units looked through; those after the first are learnable.
        twin_init: ``source`` starts the twin at its neighbour's weights, ``fresh`` draws new ones (released code).

    Raises:
        MethodError: if the base has no auxiliary heads, or for a value out of range.

    Example:
        >>> import localgrad
        >>> localgrad.methods.man(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'man(dgl)'

    Source: Su et al., Momentum Auxiliary Network, ECCV 2024, arXiv:2407.05623, and its released CIFAR code.
    Differs: the moving average runs after the optimizer step (released: before it) and starts at the source (released:
    redrawn, ``twin_init="fresh"``). As released, BatchNorm statistics are not averaged.
    """
    if not base.terms:
        raise MethodError(
            f"man({base.name}): {base.name} has no auxiliary heads to look through the bridge; use a local base"
        )
    momentum = bridges.Momentum(decay, mix, depth, twin_init)
    return replace(base, name=f"man({base.name})", bridge=bridges.chain(base.bridge, momentum))
