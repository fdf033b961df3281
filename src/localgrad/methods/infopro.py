"""Information propagation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from localgrad import heads, losses
from localgrad.errors import MethodError, nearest
from localgrad.heads import imagenet
from localgrad.heads.named import Spec, classifier
from localgrad.method import Method, Term
from localgrad.methods.composition import base
from localgrad.methods.kaiming import as_released
from localgrad.site import HeadBuilder, Only, Ramp, Site, Stages
from localgrad.spans import Local
from localgrad.task import Task

EMBEDDING = 128  # dimensions that the contrastive loss compares
_DECODERS: dict[str, HeadBuilder] = {"cifar": heads.Decoder(), "imagenet": imagenet.Decoder()}


@base
def infopro(
    task: Task,
    *,
    image: tuple[float, ...] = (5.0, 0.5),
    label: tuple[float, ...] = (0.5, 1.0),
    loss: Literal["softmax", "contrast"] = "softmax",
    head: Spec | HeadBuilder = "1c2f",
    decoder: Literal["cifar", "imagenet"] | HeadBuilder = "cifar",
    released: bool = False,
) -> Method:
    """Every block keeps information about the image and about the label.

    ``L_k = lambda1_k * reconstruction(decoder_k(h_k)) + lambda2_k * label_loss(head_k(h_k))`` for ``k < K``, the
    model's own loss for the last block; both lambdas run linearly from the first boundary to the last.

    Args:
        task: from `localgrad.tasks`; its mean and std turn inputs into pixels.
        image: lambda1 at the first and at the last boundary, or one value for each stage, the stem's first, as MAN,
            MAN++ and MLAAN have it.
        label: lambda2 there. The published tables are recipes (``localgrad list recipes``).
        loss: ``softmax`` for the task's loss, ``contrast`` for the supervised contrastive one.
        head: the label head, as `localgrad.methods.dgl` takes it; ``imagenet`` for networks that read large images.
        decoder: ``cifar`` for `localgrad.heads.Decoder`, ``imagenet`` for that of `localgrad.heads.imagenet`, which
            upsamples step by step, or a builder, such as ``heads.Decoder(scale=0.5)``.
        released: heads and decoders start as in the released code, see `localgrad.methods.kaiming`.

    Raises:
        MethodError: for an unknown loss, head or decoder, or a negative weight.

    Example:
        >>> import localgrad
        >>> task = localgrad.tasks.classification(10, mean=(0.5,), std=(0.5,))
        >>> localgrad.methods.infopro(task, image=(5.0, 0.2), label=(0.05, 0.5)).name
        'infopro'

    Source: Wang et al., ICLR 2021, arXiv:2101.10832, and its released code.
    Differs: default weights lie between the published tables and end above 0; heads and decoders start as PyTorch draws
    them unless ``released``.
    """
    if loss not in ("softmax", "contrast"):
        raise MethodError(f"loss={loss!r}; infopro knows loss='softmax' and loss='contrast'")
    if min(*image, *label) < 0:
        raise MethodError(f"image={image}, label={label}; weights are at least 0")
    if min(len(image), len(label)) < 2:
        raise MethodError(
            f"image={image}, label={label}; write two weights, or one for the stem and one for each stage"
        )
    softmax = loss == "softmax"
    if not callable(decoder) and decoder not in _DECODERS:
        raise MethodError(nearest(decoder, _DECODERS, "decoder"))
    method = Method(
        "infopro",
        task,
        terms=(
            Term(
                heads.named(head, task) if softmax else classifier(head, EMBEDDING),
                task.loss if softmax else losses.Contrastive(),
                _along(label),
                scored=softmax,
            ),
            Term(
                decoder if callable(decoder) else _DECODERS[decoder],
                losses.Reconstruction(task),
                _along(image),
                scored=False,
            ),
        ),
        spans=Local(),
    )
    return as_released(method) if released else method


def _along(weights: tuple[float, ...]) -> Ramp | Stages:
    return Ramp(*weights) if len(weights) == 2 else Stages(weights)


def with_contrastive_heads(method: Method, at: Callable[[Site], bool], elsewhere: Callable[[Site], bool]) -> Method:
    """``method``, if it reconstructs images, with contrastive ``1c2f`` label heads ``at`` some sites.

    In the released code of MLAAN and MAN++ some label heads are built without the configured form and loss and fall
    back to these.
    """
    if not any(isinstance(term.loss, losses.Reconstruction) for term in method.terms):
        return method
    terms: list[Term] = []
    for term in method.terms:
        if not term.scored:
            terms.append(term)
            continue
        head = classifier("1c2f", EMBEDDING)
        terms.append(replace(term, weight=Only(term.weight, elsewhere)))
        terms.append(replace(term, head=head, loss=losses.Contrastive(), weight=Only(term.weight, at), scored=False))
    return replace(method, terms=tuple(terms))
