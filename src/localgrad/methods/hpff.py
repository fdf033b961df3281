"""Hierarchical locally supervised learning with patch feature fusion."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localgrad import heads
from localgrad.method import Method, Term
from localgrad.methods.composition import plugin
from localgrad.methods.windows import windowed
from localgrad.site import Site


@plugin
def hpff(base: Method, *, patches: int = 2) -> Method:
    """`localgrad.methods.windows`, whose auxiliary networks read the features patch by patch.

    Each block has its base loss, and each window of two consecutive blocks one of its own; other windows and weights
    are those of a base that has some, ``hpff(windows(base, local=0.001, cascade=0.999))``. Heads read ``patches x
    patches`` patches; their answers are averaged. Losses without labels, such as InfoPro's reconstruction, stand on
    windows only where there is one, since both levels read the same features.

    Args:
        base: a method with local spans, or windows.
        patches: along each side; 1 for whole features.

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
    base.require_heads("hpff")
    base, spans = windowed(base, "hpff")
    labelled = any(term.scored for term in base.terms)
    terms = []
    for term in base.terms:
        once = labelled and spans.cascade > 0 and not term.scored
        weight = _OnWindows(term, spans.width) if once else term.weight
        terms.append(replace(term, weight=weight, head=heads.Patches(term.head, patches) if patches > 1 else term.head))
    return replace(base, name=f"hpff({base.name})", terms=tuple(terms))


@dataclass(frozen=True)
class _OnWindows:
    """The weight of a term, 0 for a single block at whose end a window ends too."""

    term: Term
    width: int

    def __call__(self, site: Site) -> float:
        alone = site.span.stop - site.span.start == 1
        return 0.0 if alone and site.span.stop >= self.width else self.term.weight_at(site)
