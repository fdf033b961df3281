"""Multilaminar leap augmented auxiliary networks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from localgrad import bridges
from localgrad.bridges.leap import Twins, Where
from localgrad.method import Method
from localgrad.methods.composition import plugin
from localgrad.methods.infopro import with_contrastive_heads
from localgrad.methods.kaiming import as_released
from localgrad.methods.windows import windowed
from localgrad.site import on_block, on_window
from localgrad.spans import Overlapping, Span


@plugin
def mlaan(
    base: Method, *, leap: Where = "cascade", twins: Twins = "first", decay: float = 0.995, released: bool = False
) -> Method:
    """`localgrad.methods.windows`, whose auxiliary networks leap ahead to the end of the model.

    Each block has its base loss, and each window of two consecutive blocks has one of its own, whose heads look through
    copies of a few later units (`localgrad.bridges.Leap`). Other windows and weights are those of a base that has some,
    ``mlaan(windows(base, width=3, local=0.001, cascade=0.999))``.

    Args:
        base: a method with local spans, or windows.
        leap: which auxiliary networks look ahead: those of windows (``cascade``, the released code), those of single
            blocks (``independent``, the paper's figure), or ``both``.
        twins: whether the ``first`` copied unit (released code) or ``all`` of them are joined by a moving average.
        decay: of the moving averages.
        released: as the released CIFAR code. Single blocks have losses of their own only where a window ends inside
            the network, weights are 0.001 and 0.999 unless ``base`` has windows, the last window has weight 1. Of the
            twins only the one at the last boundary moves, before the optimizer step. Heads start as
            `localgrad.methods.kaiming` draws them. Over InfoPro twins are trained too, and single blocks have
            contrastive ``1c2f`` label heads.

    Raises:
        MethodError: if the base is not local, or for a value out of range.

    Example:
        >>> import localgrad
        >>> localgrad.methods.mlaan(localgrad.methods.dgl(localgrad.tasks.classification(10))).name
        'mlaan(dgl)'

    Source: MLAAN, AAAI 2025, arXiv:2406.16633, and its released code.
    Differs: one forward per block where theirs runs three or four, so that BatchNorm's running statistics move once per
    step. The default is the paper's form, with equal weights: every block has its own loss, the last one beside the
    last window; every moving average is updated, after the optimizer step; layers start as PyTorch draws them.
    ``released`` says what the code does instead.
    """
    base.require_heads("mlaan")
    base, spans = windowed(base, "mlaan", released)
    bridge = bridges.Leap(decay, twins, leap)
    if released:
        own = with_contrastive_heads(base, on_block, on_window)
        bridge = replace(bridge, released=True, learnable=own is not base)
        given = {field.name: getattr(spans, field.name) for field in fields(spans)}
        base = as_released(replace(own, spans=_Released(**given)))
    return replace(base, name=f"mlaan({base.name})", bridge=bridges.chain(base.bridge, bridge))


@dataclass(frozen=True)
class _Released(Overlapping):
    """The last window alone trains what the model's own head reads, with weight 1."""

    def spans(self, num_blocks: int) -> tuple[Span, ...]:
        spans = super().spans(num_blocks)
        last = next(span for span in spans if span.stop == num_blocks)  # sorted, so the longest of them
        return (*(span for span in spans if span.stop < num_blocks), replace(last, weight=1.0))
