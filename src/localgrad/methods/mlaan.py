"""Multilaminar leap augmented auxiliary networks."""

from __future__ import annotations

from dataclasses import replace

from localgrad import bridges
from localgrad.bridges.leap import Twins, Where
from localgrad.method import Method
from localgrad.methods.composition import plugin
from localgrad.methods.windows import windowed


@plugin
def mlaan(base: Method, *, leap: Where = "cascade", twins: Twins = "first", decay: float = 0.995) -> Method:
    """`localgrad.methods.windows`, whose auxiliary networks leap ahead to the end of the model.

    Each block has its base loss, and each window of two consecutive blocks has one of its own, whose heads look through
    copies of a few later units (`localgrad.bridges.Leap`). Other windows and weights are those of a base that has some,
    ``mlaan(windows(base, width=3, local=0.001, cascade=0.999))``.

    Args:
        base: a method with local spans, or windows.
        leap: which auxiliary networks look ahead: those of windows (``cascade``, the released code), those of single
            blocks (``independent``, the paper's figure), or ``both``.
        twins: whether the ``first`` copied unit (released code) or ``all`` of them are joined by a moving average.
        decay: of the moving averages.

    Raises:
        MethodError: if the base is not local, or for a value out of range.

    Example:
        >>> import localgrad
        >>> localgrad.methods.mlaan(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'mlaan(dgl)'

    Source: MLAAN, AAAI 2025, arXiv:2406.16633, and its released code.
    Differs: one forward per block where theirs runs three or four; every moving average is updated (theirs: the last
    boundary's only); all blocks have their own loss from the first on; equal weights (theirs: 0.001 and 0.999).
    """
    base.require_heads("mlaan")
    base, _ = windowed(base, "mlaan")
    bridge = bridges.chain(base.bridge, bridges.Leap(decay, twins, leap))
    return replace(base, name=f"mlaan({base.name})", bridge=bridge)
