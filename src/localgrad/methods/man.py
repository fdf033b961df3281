"""Momentum auxiliary network."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from localgrad import bridges
from localgrad.method import Method
from localgrad.methods.composition import plugin
from localgrad.methods.kaiming import as_released
from localgrad.site import Only, Stages, Weight


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
        released: as the released code: the moving average runs before the optimizer step; twin, companion, heads and
            decoders start as `localgrad.methods.kaiming` draws them, the twin apart from its source; weights of
            InfoPro that are given by stage are those of the next unit's. `localgrad.bridges.Momentum` has the bridge's
            choices one by one.

    Raises:
        MethodError: if the base has no auxiliary heads, or for a value out of range.

    Example:
        >>> import localgrad
        >>> localgrad.methods.man(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'man(dgl)'

    Source: Su et al., Momentum Auxiliary Network, ECCV 2024, arXiv:2407.05623, and its released CIFAR code.
    Differs: the moving average runs after the optimizer step and starts at the source, the rest starts as PyTorch draws
    it; ``released=True`` undoes all three. The learnable "bias" of the paper is the companion, a whole unit, as there.
    """
    base.require_heads("man")
    return looking_ahead(base, "man", bridges.Momentum(decay, mix, depth), released)


def looking_ahead(base: Method, name: str, momentum: bridges.Momentum, released: bool) -> Method:
    """``base`` whose heads look through ``momentum``, as the papers have it or as their code was ``released``."""
    if released:
        momentum = replace(momentum, twin_init="fresh", exchange="before")
        base = replace(base, terms=tuple(replace(term, weight=_ahead(term.weight)) for term in base.terms))
    method = replace(base, name=f"{name}({base.name})", bridge=bridges.chain(base.bridge, momentum))
    return as_released(method) if released else method


def _ahead(weight: Weight) -> Weight:
    if isinstance(weight, Only):
        return replace(weight, weight=_ahead(weight.weight))
    return replace(weight, ahead=True) if isinstance(weight, Stages) else weight
