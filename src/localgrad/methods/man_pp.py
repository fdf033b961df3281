"""Momentum auxiliary network with a learnable scaling bias."""

from __future__ import annotations

from localgrad import bridges
from localgrad.method import Method
from localgrad.methods.composition import plugin
from localgrad.methods.infopro import with_contrastive_heads
from localgrad.methods.man import looking_ahead
from localgrad.site import on_stem, past_stem


@plugin
def man_pp(base: Method, *, decay: float = 0.995, depth: int = 1, released: bool = False) -> Method:
    """As MAN, the two branches weighted by a learnable scalar per boundary.

    ``heads read s * companion(h) + (2 - s) * twin(h)``, s starting at 1.

    Args:
        base: a method with auxiliary heads.
        decay: of the moving average.
        depth: units looked through; 2 for vision transformers in the released code.
        released: as the released CIFAR code: everything that `localgrad.methods.man` has so, and over InfoPro, where
            the stem is a block of its own, a contrastive ``1c2f`` label head for it.

    Raises:
        MethodError: if the base has no auxiliary heads, or for a value out of range.

    Example:
        >>> import localgrad
        >>> localgrad.methods.man_pp(localgrad.methods.dgl(localgrad.tasks.classification(10)), depth=2).name
        'man_pp(dgl)'

    Source: MAN++, TPAMI 2026, arXiv:2507.16279, and its released code.
    Differs: as `localgrad.methods.man`; the released ImageNet code for several GPUs and for vision transformers moves
    the twin between forward and backward, where ``released=True`` moves it before the optimizer step; linear layers
    of vision transformers start there from N(0, 0.02^2), here as PyTorch draws them.
    """
    base.require_heads("man_pp")
    if released:
        base = with_contrastive_heads(base, on_stem, past_stem)
    return looking_ahead(base, "man_pp", bridges.Momentum(decay, "scaled", depth), released)
