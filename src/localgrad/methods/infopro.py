"""Information propagation."""

from __future__ import annotations

from typing import Literal

from localgrad import heads, losses
from localgrad.errors import MethodError
from localgrad.heads import imagenet
from localgrad.method import Method, Term
from localgrad.site import HeadBuilder, Ramp
from localgrad.spans import Local
from localgrad.task import Task


def infopro(
    task: Task,
    *,
    image: tuple[float, float] = (5.0, 0.5),
    label: tuple[float, float] = (0.5, 1.0),
    loss: Literal["softmax", "contrast"] = "softmax",
    layers: str = "1c2f",
    feature_dim: int = 128,
    decoder_scale: float = 1.0,
    image_every: int = 1,
    network: Literal["cifar", "imagenet"] = "cifar",
) -> Method:
    """Every block keeps information about the image and about the label.

    ``L_k = lambda1_k * reconstruction(decoder_k(h_k)) + lambda2_k * label_loss(head_k(h_k))`` for ``k < K``, the
    model's own loss for the last block; both lambdas run linearly from the first boundary to the last.

    Args:
        task: from `localgrad.tasks`; its mean and std turn inputs into pixels.
        image: lambda1 at the first and at the last boundary.
        label: lambda2 there. The published tables are recipes (``localgrad list recipes``).
        loss: ``softmax`` for the task's loss, ``contrast`` for the supervised contrastive one.
        layers: of the label head on small images, see `localgrad.heads.Conv`.
        feature_dim: width of its hidden layer, and of the contrastive embedding.
        decoder_scale: share of the image's sides at which the decoder works; less than 1 costs less.
        image_every: reconstruct on every so many steps only; the other steps cost what a label head does.
        network: whose heads: ``cifar`` for small images, ``imagenet`` for `localgrad.heads.imagenet`, which shrink the
            features step by step and upsample them so; ``layers`` then says nothing.

    Raises:
        MethodError: for an unknown loss or network, or a negative weight.

    Example:
        >>> import localgrad
        >>> task = localgrad.tasks.classification(10, mean=(0.5,), std=(0.5,))
        >>> localgrad.methods.infopro(task, image=(5.0, 0.2), label=(0.05, 0.5)).name
        'infopro'

    Source: Wang et al., ICLR 2021, arXiv:2101.10832.
    Differs: default weights lie between the published tables and end above 0; MAN's released code ramps by stage number
    instead of by boundary, which is not offered; ``decoder_scale`` and
    ``image_every`` are ours.
    """
    if loss not in ("softmax", "contrast"):
        raise MethodError(f"loss={loss!r}; infopro knows loss='softmax' and loss='contrast'")
    if network not in ("cifar", "imagenet"):
        raise MethodError(f"network={network!r}; infopro knows network='cifar' and network='imagenet'")
    if min(*image, *label) < 0:
        raise MethodError(f"image={image}, label={label}; weights are at least 0")
    softmax = loss == "softmax"
    outputs = task.num_outputs if softmax else feature_dim
    large = network == "imagenet"
    head: HeadBuilder = imagenet.Classifier(outputs) if large else heads.Conv(outputs, layers, feature_dim)
    decoder: HeadBuilder = imagenet.Decoder(decoder_scale) if large else heads.Decoder(scale=decoder_scale)
    return Method(
        "infopro",
        task,
        terms=(
            Term(
                task.head(head) if softmax else head,
                task.loss if softmax else losses.Contrastive(),
                Ramp(*label),
                scored=softmax,
            ),
            Term(decoder, losses.Reconstruction(task), Ramp(*image), scored=False, every=image_every),
        ),
        spans=Local(),
    )
