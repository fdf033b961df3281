"""Blocks that are recomputed unit by unit: the same step, fewer bytes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import localgrad
from localgrad import PartitionError, cuts, localize, methods
from localgrad.costs import run_step
from localgrad.measure.memory import measure
from localgrad.method import Method
from localgrad.partition import RecomputedBlock
from localgrad.randomness import keyed_randomness
from localgrad.testing import assert_isolated, assert_transparent

TASK = localgrad.tasks.classification(10)
X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return localgrad.models.resnet20()


def dropping_vit() -> nn.Module:
    torch.manual_seed(0)
    return localgrad.models.create(
        "timm:vit_tiny_patch16_224", num_classes=10, image_size=32, depth=6, drop_path_rate=0.3, proj_drop_rate=0.1
    )


MODELS = {"resnet": resnet, "vit": dropping_vit}
METHODS = {"dgl": methods.dgl(TASK), "windows": methods.windows(methods.dgl(TASK)), "e2e": methods.e2e(TASK)}


def state_after_a_step(name: str, method: Method, recompute: Sequence[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    network = localize(MODELS[name](), method, cuts.recomputed(3, recompute), example=X[:2]).train()
    with keyed_randomness(3):
        localgrad.backward(network, X, Y)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return gradients | dict(network.named_buffers())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_gradients_and_statistics_are_those_without(name: str, method: Method) -> None:
    plain, recomputed = (state_after_a_step(name, method, which) for which in ((), (0, 2)))
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


@pytest.mark.parametrize("name", MODELS)
def test_contracts_hold(name: str) -> None:
    network = localize(MODELS[name](), METHODS["dgl"], cuts.recomputed(3, (0, 1, 2)), example=X[:2])
    assert all(isinstance(block, RecomputedBlock) for block in localgrad.separate_blocks(network))
    assert_isolated(network, X, Y)
    assert_transparent(network.model, network, X)


@pytest.mark.parametrize("name", MODELS)
def test_memory_falls(name: str) -> None:
    def peak(recompute: Sequence[int]) -> int:
        network = localize(MODELS[name](), METHODS["dgl"], cuts.recomputed(2, recompute), example=X[:2]).train()
        return measure(lambda: run_step(network, X, Y), list(network.parameters())).peak_activations

    assert peak((0, 1)) <= 0.75 * peak(())


def test_what_cannot_be_recomputed_is_refused() -> None:
    with pytest.raises(PartitionError, match=r"\(4,\).* there are 3 blocks, counted from 0"):
        localize(resnet(), METHODS["dgl"], cuts.recomputed(3, (4,)), example=X[:2])
    with pytest.raises(PartitionError, match=r"block 0, from the input on, is a single unit"):
        localize(resnet(), METHODS["dgl"], cuts.recomputed(("layer1",), (0,)), example=X[:2])
    with pytest.raises(PartitionError, match="a list of modules has no units"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        localize(model, METHODS["e2e"], cuts.recomputed(list(model), (0,)), example=torch.randn(2, 3))
