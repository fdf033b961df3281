"""Successive gradient reconciliation."""

from __future__ import annotations

from dataclasses import replace

from localgrad.losses import Reconciliation
from localgrad.losses.reconciliation import Distance
from localgrad.method import Method


def sgr(base: Method, *, weight: float = 1.0, distance: Distance = "l2") -> Method:
    """Neighbouring blocks agree about the features between them.

    ``L_k + weight * distance(dL_k / dh_{k-1}, stop_gradient(dL_{k-1} / dh_{k-1}))``: the gradient that a block's loss
    has at its input is drawn to the one that the block before had at the same features. Isolation stays; no parameters
    are added. The block and its head are differentiated twice.

    Args:
        base: a method whose spans are single blocks.
        weight: of the disagreement.
        distance: ``l2``, ``relative`` or ``cosine``, see `localgrad.losses.Reconciliation`.

    Raises:
        MethodError: for wider spans, and at `localgrad.localize` for layers without a second derivative, such as fused
            attention.

    Example:
        >>> import localgrad
        >>> localgrad.methods.sgr(localgrad.methods.dgl(localgrad.tasks.classification(10)), weight=0.1).name
        'sgr(dgl)'

    Source: Yang et al., ICML 2024, arXiv:2406.05222, from its abstract and convergence statement; weight and distance
    of its experiments are not public.
    """
    base.require_heads("sgr")
    return replace(base, name=f"sgr({base.name})", reconcile=Reconciliation(weight, distance))
