"""The modifiers of lean forms again, literally: a joint tail, loss weights per block, pooling down to a least grid."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad import bridges, methods

TASK = localgrad.tasks.classification(5)
WIDTHS = (3, 4, 6, 7, 8, 8)


def chain() -> nn.Sequential:
    """Five convolutions, the last followed by the classifier."""
    torch.manual_seed(0)
    units = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.Tanh()) for a, b in pairwise(WIDTHS)]
    units[-1].extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 5)])
    return nn.Sequential(*units).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(6) % 5


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


def literal(network: localgrad.LocalNetwork, tail: int, weights: list[float], side: int | None = None) -> list[Tensor]:
    """Gradients of model and heads by the loop one would write for a chain of blocks with linear heads."""
    model, auxiliary = copy.deepcopy(network.model), copy.deepcopy(network.auxiliary)
    assert isinstance(model, nn.Sequential)
    features, y = batch()
    for k, unit in enumerate(model[: 5 - tail]):
        features = unit(features.detach())
        seen = features if side is None else F.adaptive_avg_pool2d(features, side)
        linear = auxiliary[f"{k}-{k + 1}"].heads[0][-1]
        (weights[k] * F.cross_entropy(linear(seen.mean((2, 3))), y)).backward()
    F.cross_entropy(model[5 - tail :](features.detach()), y).backward()
    found = [*gradients(model), *gradients(auxiliary)]
    assert all(g is not None for g in found)
    return found


@pytest.mark.parametrize("tail", [1, 2, 4])
def test_a_joint_tail_is_one_span_without_heads_inside(tail: int) -> None:
    method = methods.tail(methods.dgl(TASK, head="linear"), blocks=tail)
    network = localgrad.localize(chain(), method, 5, example=batch()[0])
    assert sorted(network.auxiliary) == [f"{k}-{k + 1}" for k in range(5 - tail)]
    localgrad.backward(network, *batch())
    ours = [*gradients(network.model), *gradients(network.auxiliary)]
    assert all(torch.equal(a, b) for a, b in zip(ours, literal(network, tail, [1.0] * 4), strict=True))


@pytest.mark.parametrize(
    ("factor", "least", "side"), [(2, 1, 4), (4, 4, 4), (4, 3, 4), (8, 2, 2), (4, 16, 8), (9, 1, 1)]
)
def test_pooling_leaves_a_least_grid(factor: int, least: int, side: int) -> None:
    method = replace(methods.dgl(TASK, head="linear"), bridge=bridges.Pool(factor, least))
    network = localgrad.localize(chain(), method, 5, example=batch()[0])
    bridge = network.auxiliary["0-1"].bridge
    features = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert (features if bridge is None else bridge(features)).shape[2:] == (side, side)
    localgrad.backward(network, *batch())
    for a, b in zip(
        [*gradients(network.model), *gradients(network.auxiliary)], literal(network, 1, [1.0] * 4, side), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


def test_what_makes_no_sense_is_refused() -> None:
    dgl = methods.dgl(TASK)
    with pytest.raises(localgrad.MethodError, match="tail=0; the model's own loss trains at least the last block"):
        methods.tail(dgl, blocks=0)
    with pytest.raises(localgrad.MethodError, match="tail needs a local base like dgl"):
        methods.tail(methods.windows(dgl))
    with pytest.raises(localgrad.MethodError, match="least=0"):
        methods.lean(TASK, least=0)
