"""Periodically guided local learning."""

from __future__ import annotations

from dataclasses import replace

from localgrad.method import Method
from localgrad.spans import Periodic


def pgl(base: Method, *, every: int = 10, duration: int = 1, start: int = 0) -> Method:
    """Local training that the global loss guides from time to time.

    On ``duration`` of every ``every`` steps, from step ``start`` on, the span is (0, K): the model's own loss trains
    all blocks, recomputed one by one in the backward pass so that memory stays low, and auxiliary heads rest. On all
    other steps the base method's spans apply.

    Args:
        base: a local method.
        every: period in steps; 1 is end-to-end training.
        duration: guided steps of a period.
        start: first step that may be guided.

    Raises:
        MethodError: unless ``1 <= duration <= every`` and ``start >= 0``.

    Example:
        >>> import localgrad
        >>> method = localgrad.methods.pgl(localgrad.methods.dgl(localgrad.tasks.classification(10)), every=10)
        >>> method.spans(4, 0), len(method.spans(4, 1))
        ((Span(start=0, stop=4, weight=1.0),), 4)

    Source: PGL, ICML 2022 workshop, arXiv:2208.00821. A reconstruction: only its abstract is public ("reinstates the
    global objective repetitively"); period, duration and the gradient of a guided step are our reading.
    Differs: unknown. The reading that distils the last head's logits instead is not offered yet.
    """
    return replace(base, name=f"pgl({base.name})", spans=Periodic(base.spans, every, duration, start), checkpoint=True)
