"""Loss weights that differ from block to block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localgrad.errors import MethodError
from localgrad.method import Method, Term
from localgrad.site import Ramp, Site


def weighted(base: Method, *, first: float = 1.0, last: float = 1.0) -> Method:
    """Every auxiliary loss is multiplied by a weight that runs linearly over the boundaries.

    ``w_k = first + (last - first) * k / (K - 2)`` after block ``k``; the model's own loss keeps its weight. With SGD a
    block's weight is a factor of its learning rate, and of its head's, weight decay left out.

    Args:
        base: a method with auxiliary heads.
        first: weight at the first boundary.
        last: weight at the last one.

    Raises:
        MethodError: if the base has no auxiliary heads, or for a weight that is not positive.

    Example:
        >>> import localgrad
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(10))
        >>> localgrad.methods.weighted(method, first=0.5).name
        'weighted(dgl)'

    Source: ours; InfoPro's ramps (arXiv:2101.10832) on any base.
    """
    base.require_heads("weighted")
    if not min(first, last) > 0:
        raise MethodError(f"first={first}, last={last}; both weights must be positive")
    ramp = Ramp(first, last)
    terms = tuple(replace(term, weight=_Scaled(term, ramp)) for term in base.terms)
    return replace(base, name=f"weighted({base.name})", terms=terms)


@dataclass(frozen=True)
class _Scaled:
    term: Term
    ramp: Ramp

    def __call__(self, site: Site) -> float:
        return self.ramp(site) * self.term.weight_at(site)
