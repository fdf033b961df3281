"""Momentum auxiliary network."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from localgrad import bridges
from localgrad.method import Method
from localgrad.twins import Buffers, When


def man(
    base: Method,
    *,
    decay: float = 0.995,
    mix: Literal["sum", "ema", "learnable", "pair"] = "sum",
    depth: int = 1,
    twin_init: Literal["source", "fresh"] = "source",
    companion_init: Literal["source", "fresh"] = "fresh",
    exchange: When = "after",
    buffers: Buffers = "none",
    borders: int = 1,
) -> Method:
    """Auxiliary heads look through the next unit of the network: a momentum twin of it plus a learnable companion.

    ``heads read companion(h) + twin(h)``, ``twin <- decay * twin + (1 - decay) * next unit`` after each optimizer step.
    Parameters cross the boundary, gradients do not.

    Args:
        base: a method with auxiliary heads.
        decay: of the moving average.
        mix: ``sum``; for the ablation ``ema`` or ``learnable`` keep one of the two, ``pair`` has two learnable units.
        depth: units looked through; those after the first are learnable.
        twin_init: ``source`` starts the twin at its neighbour's weights, ``fresh`` draws new ones (released code).
        companion_init: the same for the learnable copies; ``source`` suits pretrained networks.
        exchange: the moving average runs ``after`` the optimizer step, or ``before`` it (released code).
        buffers: BatchNorm statistics of the twin: ``none`` keeps its own (released code), ``copy`` and ``ema`` follow.
        borders: build the bridge on every so many boundaries only; the others keep plain heads, which costs less.

    Raises:
        MethodError: if the base has no auxiliary heads, or for a value out of range.

    Example:
        >>> import localgrad
        >>> localgrad.methods.man(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'man(dgl)'

    Source: Su et al., Momentum Auxiliary Network, ECCV 2024, arXiv:2407.05623, and its released CIFAR code.
    Differs: the moving average runs after the optimizer step and starts at the source; ``exchange="before",
    twin_init="fresh"`` is the released code.
    """
    base.require_heads("man")
    momentum = bridges.Momentum(decay, mix, depth, twin_init, companion_init, exchange, buffers, borders)
    return replace(base, name=f"man({base.name})", bridge=bridges.chain(base.bridge, momentum))
