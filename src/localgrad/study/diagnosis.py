"""Looks inside blocks: what a probe reads from their features, where their gradients point, what they resemble."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad import methods
from localgrad.engine import backward, features
from localgrad.layout import ToMaps, layout_of
from localgrad.localization import localize
from localgrad.network import LocalNetwork


@torch.no_grad()
def features_of(network: LocalNetwork, inputs: Tensor, grid: int = 4) -> Iterator[Tensor]:
    """Pooled features behind each block in eval mode, (B, C * grid ** 2): positions averaged to ``grid x grid``.

    Args:
        network: left in eval mode.
        inputs: (B, C, H, W).
    """
    network.eval()
    hints = [*(cut.channels_hint for cut in network.cuts), None]
    for behind, hint in zip(features(network, inputs), hints, strict=True):
        if behind.ndim > 2:
            maps = ToMaps(layout_of(behind, inputs, hint))(behind)
            behind = F.adaptive_avg_pool2d(maps, (min(grid, maps.shape[2]), min(grid, maps.shape[3])))
        yield behind.flatten(1)


def linear_probe(train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor, ridge: float = 1.0) -> float:
    """Share of the test samples that a linear classifier on ``train`` (N, D) gets right.

    The classifier is ridge regression on one-hot targets, each feature standardised by ``train``; its penalty is
    ``ridge * N / 100``. It is fitted exactly, so that probes differ by their features only.
    """
    mean, spread = train.double().mean(0), train.double().std(0).clamp_min(1e-8)
    x, z = ((part.double() - mean) / spread for part in (train, test))
    onehot = F.one_hot(train_targets, int(train_targets.max()) + 1).double()
    centre = onehot.mean(0)
    penalty = ridge * len(x) / 100 * torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ (onehot - centre))
    return (((z @ weight) + centre).argmax(1) == test_targets).double().mean().item()


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Similarity in [0, 1] of two sets of features (N, D) and (N, E) of the same samples; rotations do not count.

    ``|| a' b ||^2 / (|| a' a || * || b' b ||)`` in Frobenius norms, columns centred.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, arXiv:1905.00414.
    """
    a, b = (part.double() - part.double().mean(0) for part in (a, b))
    # By the samples' products: there are fewer samples than pairs of features.
    inner_a, inner_b = a @ a.T, b @ b.T
    return ((inner_a * inner_b).sum() / (inner_a.norm() * inner_b.norm())).item()


def gradient_cosines(network: LocalNetwork, inputs: Tensor, targets: Any) -> list[float]:
    """For each block, the cosine between the gradient its method gives and the one of end-to-end training.

    Both at the same weights, on the same batch, in training mode; auxiliary networks are left out. NaN for a block
    without parameters. BatchNorm statistics and gradients are left as they were.
    """
    network.train()
    buffers = [buffer.clone() for buffer in network.buffers()]
    names = tuple(cut.name for cut in network.cuts)
    whole = localize(network.model, methods.e2e(network.method.task), names or 1, example=inputs[:2])
    found = []
    for one in (network, whole):
        one.zero_grad(set_to_none=True)
        backward(one, inputs, targets)
        found.append([_flat(p.grad for p in one.parameters_of(k)) for k in range(one.num_blocks)])
        one.zero_grad(set_to_none=True)
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return [F.cosine_similarity(a, b, 0).item() if a.numel() else float("nan") for a, b in zip(*found, strict=True)]


def _flat(gradients: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([torch.zeros(0), *(g.detach().flatten().cpu() for g in gradients if g is not None)])
