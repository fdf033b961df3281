"""Logit consistency."""

from __future__ import annotations

from dataclasses import replace

from localgrad.errors import MethodError
from localgrad.losses import Consistent
from localgrad.method import Method


def logit_consistency(base: Method, *, share: float = 0.5) -> Method:
    """Each block's prediction stays near the one of the block before.

    ``share * L_k + (1 - share) * KL(p_k || stop_gradient(p_{k-1}))`` for every loss of the labels, the model's own
    included; ``p_0`` is uniform.

    Args:
        base: a method whose heads answer with logits.
        share: of the loss of the labels; 1 is the base method.

    Raises:
        MethodError: for a share outside (0, 1], or heads without logits.

    Example:
        >>> import localgrad
        >>> localgrad.methods.logit_consistency(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'logit_consistency(dgl)'

    Source: SID, arXiv:2510.03273, and ZeroLock, arXiv:2608.07974.
    Differs: blocks are isolated and read features (SID trains one extractor by all losses). With several windows at a
    boundary the next one follows the narrowest.
    """
    base.require_logits("logit_consistency")
    if not 0.0 < share <= 1.0:
        raise MethodError(f"share={share}; it must be above 0 and at most 1")
    terms = tuple(replace(t, loss=Consistent(t.loss, share)) if t.scored else t for t in base.terms)
    final = Consistent(base.final_loss or base.task.loss, share)
    return replace(base, name=f"logit_consistency({base.name})", terms=terms, final_loss=final)
