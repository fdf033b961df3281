"""Logit consistency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from localgrad.errors import MethodError
from localgrad.losses.distillation import divergence
from localgrad.method import Method, Network, Observer, Rule, Term
from localgrad.methods.composition import plugin
from localgrad.task import Batch


@plugin
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
    logits = base.require_logits("logit_consistency")
    if not 0.0 < share <= 1.0:
        raise MethodError(f"share={share}; it must be above 0 and at most 1")
    return replace(base, name=f"logit_consistency({base.name})", rules=(*base.rules, _Consistency(share, logits)))


@dataclass(frozen=True)
class _Consistency(Rule):
    share: float
    logits: Callable[[Any], Tensor]
    reason: ClassVar[str] = "compares the answers of neighbouring heads"

    def observe(self, network: Network, batch: Batch) -> _Answers:
        return _Answers(self)


class _Answers(Observer):
    """Remembers what the first scored head at the boundary before answered."""

    def __init__(self, rule: _Consistency) -> None:
        self.share, self.logits = rule.share, rule.logits
        self.previous: Any = None
        self.answers: tuple[int, Any] | None = None

    def term_loss(self, boundary: int, term: Term | None, loss: Tensor, output: Any, batch: Batch) -> Tensor:
        if self.answers is not None and self.answers[0] < boundary:
            self.previous, self.answers = self.answers[1], None
        if term is not None and not term.scored:
            return loss
        if self.answers is None and term is not None:
            self.answers = (boundary, tree_map_only(Tensor, Tensor.detach, output))
        logits = self.logits(output)
        before = torch.zeros_like(logits) if self.previous is None else self.logits(self.previous)
        return self.share * loss + (1.0 - self.share) * divergence(logits, before, reverse=True)
