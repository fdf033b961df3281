"""Gradient accumulation over micro-batches."""

from __future__ import annotations

from dataclasses import replace

from localgrad.method import Accumulate, Method, Wait
from localgrad.methods.composition import plugin


@plugin
def accumulation(base: Method, *, parts: int = 4, wait: Wait = "device") -> Method:
    """Run each batch in ``parts`` micro-batches and add up their gradients, weighted by their share of the samples.

    All parts pass a block, or a run of blocks that spans link, before the next one begins. So a block can step, and its
    gradients are freed, before the next block runs; what waits is one boundary feature for each part.

    Gradients equal the base method's where no layer or loss looks across samples. BatchNorm normalises by micro-batch
    and moves its statistics ``parts`` times; the similarities of `localgrad.methods.predsim`, contrastive losses and
    the distances of `localgrad.methods.local_critic` are those within a micro-batch.

    Inputs and targets with a row for each sample are cut; what all samples share, a mask (T, T) or position ids (1, T),
    goes to every part whole, see `localgrad.batches.parts_of`.

    Args:
        base: any method.
        parts: micro-batches per batch.
        wait: where boundary features wait meanwhile: ``device``, ``host``, or ``bf16``: on the host, rounded.

    Raises:
        MethodError: for fewer than 1 part or an unknown place.

    Example:
        >>> import localgrad
        >>> base = localgrad.methods.dgl(localgrad.tasks.classification(10))
        >>> localgrad.methods.accumulation(base, parts=2).micro_batches
        2
    """
    accumulate = Accumulate(base.accumulate.parts * Accumulate(parts).parts, wait)
    return replace(base, name=f"accumulation({base.name})", accumulate=accumulate)
