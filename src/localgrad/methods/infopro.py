"""Information propagation."""

from __future__ import annotations

from typing import Literal

from localgrad import heads, losses
from localgrad.errors import MethodError, nearest
from localgrad.heads import imagenet
from localgrad.heads.named import Spec, classifier
from localgrad.method import Method, Term
from localgrad.methods.composition import base
from localgrad.site import HeadBuilder, Ramp
from localgrad.spans import Local
from localgrad.task import Task

EMBEDDING = 128  # dimensions that the contrastive loss compares
_DECODERS: dict[str, HeadBuilder] = {"cifar": heads.Decoder(), "imagenet": imagenet.Decoder()}


@base
def infopro(
    task: Task,
    *,
    image: tuple[float, float] = (5.0, 0.5),
    label: tuple[float, float] = (0.5, 1.0),
    loss: Literal["softmax", "contrast"] = "softmax",
    head: Spec | HeadBuilder = "1c2f",
    decoder: Literal["cifar", "imagenet"] | HeadBuilder = "cifar",
) -> Method:
    """Every block keeps information about the image and about the label.

    ``L_k = lambda1_k * reconstruction(decoder_k(h_k)) + lambda2_k * label_loss(head_k(h_k))`` for ``k < K``, the
    model's own loss for the last block; both lambdas run linearly from the first boundary to the last.

    Args:
        task: from `localgrad.tasks`; its mean and std turn inputs into pixels.
        image: lambda1 at the first and at the last boundary.
        label: lambda2 there. The published tables are recipes (``localgrad list recipes``).
        loss: ``softmax`` for the task's loss, ``contrast`` for the supervised contrastive one.
        head: the label head, as `localgrad.methods.dgl` takes it; ``imagenet`` for networks that read large images.
        decoder: ``cifar`` for `localgrad.heads.Decoder`, ``imagenet`` for that of `localgrad.heads.imagenet`, which
            upsamples step by step, or a builder, such as ``heads.Decoder(scale=0.5)``.

    Raises:
        MethodError: for an unknown loss, head or decoder, or a negative weight.

    Example:
        >>> import localgrad
        >>> task = localgrad.tasks.classification(10, mean=(0.5,), std=(0.5,))
        >>> localgrad.methods.infopro(task, image=(5.0, 0.2), label=(0.05, 0.5)).name
        'infopro'

    Source: Wang et al., ICLR 2021, arXiv:2101.10832.
    Differs: default weights lie between the published tables and end above 0; MAN's released code ramps by stage number
    instead of by boundary, which is not offered.
    """
    if loss not in ("softmax", "contrast"):
        raise MethodError(f"loss={loss!r}; infopro knows loss='softmax' and loss='contrast'")
    if min(*image, *label) < 0:
        raise MethodError(f"image={image}, label={label}; weights are at least 0")
    softmax = loss == "softmax"
    if not callable(decoder) and decoder not in _DECODERS:
        raise MethodError(nearest(decoder, _DECODERS, "decoder"))
    return Method(
        "infopro",
        task,
        terms=(
            Term(
                heads.named(head, task) if softmax else classifier(head, EMBEDDING),
                task.loss if softmax else losses.Contrastive(),
                Ramp(*label),
                scored=softmax,
            ),
            Term(
                decoder if callable(decoder) else _DECODERS[decoder],
                losses.Reconstruction(task),
                Ramp(*image),
                scored=False,
            ),
        ),
        spans=Local(),
    )
