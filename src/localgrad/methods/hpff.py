"""Hierarchical locally supervised learning with patch feature fusion."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localgrad import heads, losses
from localgrad.errors import MethodError
from localgrad.method import Method, Term
from localgrad.methods.composition import plugin
from localgrad.methods.kaiming import as_released
from localgrad.methods.windows import windowed
from localgrad.site import Only, Site, Weight, on_block, on_window


@plugin
def hpff(base: Method, *, patches: int = 2, released: bool = False) -> Method:
    """`localgrad.methods.windows`, whose auxiliary networks read the features patch by patch.

    Each block has its base loss, and each window of two consecutive blocks one of its own; other windows and weights
    are those of a base that has some, ``hpff(windows(base, local=0.001, cascade=0.999))``. Heads read ``patches x
    patches`` patches; their answers are averaged. Losses without labels, such as InfoPro's reconstruction, stand on
    windows only where there is one, since both levels read the same features.

    Args:
        base: a method with local spans, or windows.
        patches: along each side; 1 for whole features.
        released: as the released CIFAR code. The first block has no loss of its own, weights are 0.001 and 0.999 unless
            ``base`` has windows. Label heads read whole features and count 1 on single blocks, whatever the weight of
            the base. Images are reconstructed on windows only, by a decoder for each patch, their losses added up.
            Convolutions start as `localgrad.methods.kaiming` draws them.

    Raises:
        MethodError: if the base is not local, for a value out of range, or if ``released`` and the base has losses
            that the released code has no form for.

    Example:
        >>> import localgrad
        >>> localgrad.methods.hpff(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'hpff(dgl)'

    Source: Su et al., HPFF, ECCV 2024, arXiv:2407.05638, and its released CIFAR code.
    Differs: one forward per block where the released code runs three, so that BatchNorm's running statistics move once
    per step. The default is the paper's form, with equal weights: every block has all losses of the base with their
    weights, all heads read patches, answers are averaged, layers start as PyTorch draws them. ``released`` says what
    the code does instead.
    """
    base.require_heads("hpff")
    base, spans = windowed(base, "hpff", released)
    if released:
        terms = [part for term in base.terms for part in _released(term, patches)]
        return as_released(replace(base, name=f"hpff({base.name})", terms=tuple(terms)))
    labelled = any(term.scored for term in base.terms)
    terms = []
    for term in base.terms:
        once = labelled and spans.cascade > 0 and not term.scored
        weight = _OnWindows(term, spans.width) if once else term.weight
        terms.append(replace(term, weight=weight, head=heads.Patches(term.head, patches) if patches > 1 else term.head))
    return replace(base, name=f"hpff({base.name})", terms=tuple(terms))


def _released(term: Term, patches: int) -> list[Term]:
    """What the released code makes of a term: apart on the patches of windows, or whole and of weight 1 on blocks."""
    if isinstance(term.loss, losses.Reconstruction):
        weight = _Summed(term.weight, patches)  # the loss of the whole is the mean of those of the patches
        head = heads.Patches(term.head, patches, shared=False)
        return [replace(term, head=head, weight=Only(weight, on_window))]
    if not term.scored and not isinstance(term.loss, losses.Contrastive):
        raise MethodError(
            f"hpff(released=True): the released code has no form for {type(term.loss).__name__}; it has label losses "
            "and InfoPro's reconstruction. Leave released=True out"
        )
    return [replace(term, weight=Only(1.0, on_block)), replace(term, weight=Only(term.weight, on_window))]


@dataclass(frozen=True)
class _Summed:
    weight: Weight
    patches: int

    def __call__(self, site: Site) -> float:
        return self.patches ** len(site.layout.grid) * (self.weight(site) if callable(self.weight) else self.weight)


@dataclass(frozen=True)
class _OnWindows:
    """The weight of a term, 0 for a single block at whose end a window ends too."""

    term: Term
    width: int

    def __call__(self, site: Site) -> float:
        alone = site.span.stop - site.span.start == 1
        return 0.0 if alone and site.span.stop >= self.width else self.term.weight_at(site)
