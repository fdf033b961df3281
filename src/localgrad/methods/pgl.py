"""Periodically guided local learning."""

from __future__ import annotations

from dataclasses import replace

from localgrad.method import Method
from localgrad.methods.composition import plugin
from localgrad.spans import Periodic


@plugin
def pgl(base: Method, *, every: int = 10, duration: int = 1, start: int = 0, recompute: bool = True) -> Method:
    """Local training that the global loss guides from time to time.

    Guided are ``duration`` of every ``every`` steps, from step ``start`` on: the span is (0, K), the model's own loss
    trains all blocks, recomputed one by one in the backward pass so that memory stays low, and auxiliary heads rest. On
    all other steps the base method applies. Write epochs as ``every=10 * len(loader)``.

    Args:
        base: a local method.
        every: period, in steps; 1 guides always.
        duration: guided steps of a period.
        start: the first step that may be guided.
        recompute: run blocks again in the backward pass of guided steps; needs a model that torch.fx can take apart,
            see `localgrad.methods.checkpointing`.

    Raises:
        MethodError: unless ``1 <= duration <= every`` and ``start >= 0``.

    Example:
        >>> import localgrad
        >>> method = localgrad.methods.pgl(localgrad.methods.dgl(localgrad.tasks.classification(10)), every=10)
        >>> method.spans(4, 0), len(method.spans(4, 1))
        ((Span(start=0, stop=4, weight=1.0),), 4)

    Source: PGL, ICML 2022 workshop, arXiv:2208.00821. A reconstruction: only its abstract is public ("reinstates the
    global objective repetitively"). Period and duration are ours.
    """
    schedule = Periodic(base.spans, every, duration, start)
    return replace(base, name=f"pgl({base.name})", spans=schedule, recompute=replace(base.recompute, blocks=recompute))
