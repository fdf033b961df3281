"""Hierarchical locally supervised learning with patch feature fusion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from localgrad import heads
from localgrad.errors import MethodError, nearest
from localgrad.method import Method, Term
from localgrad.site import Site
from localgrad.spans import Overlapping


def hpff(
    base: Method,
    *,
    width: int = 2,
    patches: int = 2,
    independent: float = 1.0,
    cascade: float = 1.0,
    unlabelled: Literal["cascade", "both"] = "cascade",
) -> Method:
    """Blocks are trained alone and in windows, by auxiliary networks that read the features patch by patch.

    Each block has its base loss with weight ``independent``, each window of ``width`` consecutive blocks one of its own
    with weight ``cascade``. Heads read ``patches x patches`` patches; their answers are averaged.

    Args:
        base: a method with local spans.
        width: blocks of a window; the paper uses 2.
        patches: along each side; 1 for whole features.
        independent: weight of the losses of single blocks; 0 leaves them out.
        cascade: weight of the losses of windows; 0 leaves them out.
        unlabelled: where losses without labels stand, such as InfoPro's reconstruction: on windows only where there is
            one, since both levels read the same features, or on ``both`` levels.

    Raises:
        MethodError: if the base is not local, or for a value out of range.

    Example:
        >>> import localgrad
        >>> localgrad.methods.hpff(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'hpff(dgl)'

    Source: Su et al., HPFF, ECCV 2024, arXiv:2407.05638.
    Differs: one forward per block where the released code runs three; equal weights (theirs: 0.001 and 0.999); see
    `localgrad.heads.Patches` for the patches.
    """
    spans = Overlapping(width, independent, cascade, base.require_local("hpff").tail)
    base.require_heads("hpff")
    if unlabelled not in ("cascade", "both"):
        raise MethodError(nearest(unlabelled, ("cascade", "both"), "unlabelled"))
    labelled = any(term.scored for term in base.terms)
    terms = []
    for term in base.terms:
        once = labelled and unlabelled == "cascade" and cascade > 0 and not term.scored
        weight = _OnWindows(term, width) if once else term.weight
        terms.append(replace(term, weight=weight, head=heads.Patches(term.head, patches) if patches > 1 else term.head))
    return replace(base, name=f"hpff({base.name})", spans=spans, terms=tuple(terms))


@dataclass(frozen=True)
class _OnWindows:
    """The weight of a term, 0 for a single block at whose end a window ends too."""

    term: Term
    width: int

    def __call__(self, site: Site) -> float:
        alone = site.span.stop - site.span.start == 1
        return 0.0 if alone and site.span.stop >= self.width else self.term.weight_at(site)
