"""Multilaminar leap augmented auxiliary networks."""

from __future__ import annotations

from dataclasses import replace

from localgrad import bridges
from localgrad.bridges.leap import Twins, Where
from localgrad.method import Method
from localgrad.spans import Ends, Overlapping, Periodic, Schedule


def mlaan(
    base: Method,
    *,
    width: int = 2,
    stride: int = 1,
    independent: float = 1.0,
    cascade: float = 1.0,
    ends: Ends = "both",
    every: int = 1,
    leap: Where = "cascade",
    twins: Twins = "first",
    decay: float = 0.995,
) -> Method:
    """Blocks are trained alone and in windows, through auxiliary networks that leap ahead to the end of the model.

    Each block has its base loss with weight ``independent``; each window of ``width`` consecutive blocks has one of its
    own with weight ``cascade``, whose heads look through copies of a few later units (`localgrad.bridges.Leap`).

    Args:
        base: a method with local spans.
        width: blocks of a window, 2 or 3.
        stride: blocks from the beginning of one window to that of the next; ``width`` for windows that do not overlap,
            whose backward passes cost half as much.
        independent: weight of the losses of single blocks; 0 leaves them out.
        cascade: weight of the losses of windows; 0 leaves them out, with their chains: the base method.
        ends: where a window ends, the single block has its own loss too (``both``) or not (``cascade``), which lets
            windows that do not overlap do with one backward pass per block.
        every: windows on every so many steps only; on the others blocks train alone.
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
    alone = base.require_local("mlaan")
    spans: Schedule = Overlapping(width, independent, cascade, alone.tail, stride, ends)
    if every != 1:
        spans = Periodic(alone, every, guide=spans)
    base.require_heads("mlaan")
    bridge = bridges.chain(base.bridge, bridges.Leap(decay, twins, leap))
    return replace(base, name=f"mlaan({base.name})", spans=spans, bridge=bridge)
