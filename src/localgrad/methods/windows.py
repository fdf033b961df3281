"""Overlapping windows over any base method."""

from __future__ import annotations

from dataclasses import replace

from localgrad.method import Method
from localgrad.methods.composition import plugin
from localgrad.spans import Ends, Overlapping


@plugin
def windows(
    base: Method,
    *,
    width: int = 2,
    stride: int = 1,
    local: float = 1.0,
    cascade: float = 1.0,
    ends: Ends = "both",
) -> Method:
    """Each block is also trained by losses up to ``width - 1`` blocks later, through the blocks between.

    ``spans = (k, k + 1) with weight local, (k, k + width) with weight cascade``, each with its own auxiliary network.

    Args:
        base: a method with local spans.
        width: blocks a window covers.
        local: weight of the losses on single blocks; 0 leaves them out.
        cascade: weight of the losses over windows; 0 leaves them out.
        ends: where a window ends, the single block has its own loss too (``both``) or not (``cascade``), which lets
            windows that do not overlap do with one backward pass per block; ``only`` there, as in released code.
        stride: blocks from the beginning of one window to that of the next; ``width`` for windows that do not overlap,
            whose backward passes cost half as much.

    Raises:
        MethodError: if the base is not local, or for a width below 2.

    Example:
        >>> import localgrad
        >>> localgrad.methods.windows(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'windows(dgl)'

    Source: the two levels of supervision that HPFF (arXiv:2407.05638) and MLAAN (arXiv:2406.16633) share.
    Differs: one forward per block where their code runs two or three; equal weights by default.
    """
    spans = Overlapping(width, local, cascade, base.require_local("windows").tail, stride, ends)
    return replace(base, name=f"windows({base.name})", spans=spans)


def windowed(base: Method, plugin: str, released: bool = False) -> tuple[Method, Overlapping]:
    """``base`` if it has windows, or else in windows of 2, and which they are.

    Those that are ``released`` have weights 0.001 and 0.999 unless ``base`` says otherwise, and single blocks have
    losses of their own only where a window ends.
    """
    if not isinstance(base.spans, Overlapping):
        base.require_local(plugin)
        local, cascade = (0.001, 0.999) if released else (1.0, 1.0)
        base = replace(windows(base, local=local, cascade=cascade), name=base.name)
    assert isinstance(base.spans, Overlapping)
    spans = replace(base.spans, ends="only") if released else base.spans
    return replace(base, spans=spans), spans
