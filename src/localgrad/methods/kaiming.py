"""Auxiliary networks that start as the papers' releases draw them."""

from __future__ import annotations

from dataclasses import replace

from localgrad import bridges
from localgrad.initialization import Kaiming
from localgrad.method import Method
from localgrad.methods.composition import plugin


@plugin
def kaiming(base: Method) -> Method:
    """Draw every convolution of heads, decoders and freshly drawn copies of units from N(0, 2 / (k^2 C_out)).

    PyTorch's own layers, and so the heads here, draw from U(-b, b) with b = 1 / sqrt(k^2 C_in), which is narrower by a
    factor of ``sqrt(6 C_in / C_out)``: 2.4 where a convolution keeps its channels. Copies that start at the weights of
    their source keep them.

    Args:
        base: a method with auxiliary heads. Plug-ins that follow draw their own bridges as before.

    Raises:
        MethodError: if the base has no auxiliary heads.

    Example:
        >>> import localgrad
        >>> localgrad.methods.kaiming(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'kaiming(dgl)'

    Source: the released CIFAR and ImageNet code of InfoPro, AugLocal, HPFF, MAN and MAN++, which draws every
    convolution of the network so; the rule is that of He et al., ICCV 2015, arXiv:1502.01852, with ``fan_out``.
    """
    base.require_heads("kaiming")
    return as_released(replace(base, name=f"kaiming({base.name})"))


def as_released(method: Method) -> Method:
    """``method``, drawn by `kaiming`, under its own name."""
    terms = tuple(
        term if isinstance(term.head, Kaiming) else replace(term, head=Kaiming(term.head)) for term in method.terms
    )
    return replace(method, terms=terms, bridge=method.bridge and bridges.drawn(method.bridge))
