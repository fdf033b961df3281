"""`localize`: what it refuses, and what a `LocalNetwork` survives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from localgrad import PartitionError, localize

TASK = localgrad.tasks.classification(3)
DGL = localgrad.methods.dgl(TASK)
X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing given; say where to cut by exactly one of"),
        ({"num_blocks": 2, "cuts": ("3",)}, "num_blocks and cuts given"),
        ({"num_blocks": 0}, r"num_blocks=0, but this Sequential has 2 cut points; use 1 to 3 blocks"),
        ({"num_blocks": -1}, "num_blocks=-1"),
        ({"num_blocks": 4}, "num_blocks=4, but"),
        ({"num_blocks": "4"}, "num_blocks='4' is a str; write a whole number"),
        ({"num_blocks": 2.5}, "num_blocks=2.5 is a float"),
        ({"num_blocks": True}, "num_blocks=True is a bool"),
        ({"cuts": ()}, r"cuts=\(\); name the modules .*num_blocks=1"),
        ({"cuts": "layer2"}, r"cuts='layer2' is one string; .*cuts=\('layer2',\)"),
        ({"cuts": (3,)}, r"cuts=\(3,\); name the modules"),
        ({"modules": []}, r"modules=\[\]: name at least one module"),
        ({"num_blocks": 2, "balance": "byte"}, "unknown balance 'byte'; did you mean 'bytes'"),
        ({"num_blocks": 2, "stem": "own "}, "unknown stem 'own '; did you mean 'own'"),
        ({"num_blocks": 2, "balance": "bytes", "stem": "own"}, "stem='own' has no effect here"),
        ({"cuts": ("3",), "balance": "bytes"}, "balance='bytes' has no effect here"),
        ({"num_blocks": 2, "taps": ("nix",)}, "taps: unknown module 'nix'"),
    ],
)
def test_requests_that_say_too_little_or_too_much(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message) as caught:
        localize(mlp(), DGL, example=X, **arguments)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_trained_in_blocks() -> None:
    with pytest.raises(PartitionError, match="ReLU has no parameters"):
        localize(nn.ReLU(), DGL, num_blocks=1, example=X)
    with pytest.raises(PartitionError, match="model is a builtin_function"):
        localize(torch.relu, DGL, num_blocks=1, example=X)  # type: ignore[arg-type]


def test_module_lists_that_are_not_the_model() -> None:
    model = mlp()
    with pytest.raises(PartitionError, match=r"do not compute what Sequential\.forward does"):
        localize(model, DGL, modules=[model[0], model[3], model[5]], example=X)
    with pytest.raises(PartitionError, match="block 1 does not run on what the blocks before it return"):
        localize(model, DGL, modules=[model[5], model[0]], example=X)
    pair = nn.Sequential(Two(), nn.Identity())
    with pytest.raises(PartitionError, match="block 0 returns a tuple; all but the last must return one tensor"):
        localize(pair, DGL, modules=[pair[0], pair[1]], example=X)
    with pytest.raises(PartitionError, match="is used by block 0 and by block 1"):
        localize(nn.Sequential(model[0], model[0]), DGL, modules=[model[0], model[0]], example=X)


def test_a_deep_copy_trains_independently() -> None:
    torch.manual_seed(0)
    network = localize(mlp(), DGL, num_blocks=3, example=X)
    before = copy.deepcopy(network.state_dict())
    other = copy.deepcopy(network)
    own = {id(p) for p in other.parameters()}
    assert {id(p) for block in other.blocks for p in block.parameters()} <= own
    assert not own & {id(p) for p in network.parameters()}
    other.model.eval()
    assert network.model.training
    other.model.train()
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    localgrad.backward(other, X, Y)
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not torch.equal(other.model[0].weight, network.model[0].weight)


def test_to_keeps_blocks_in_step() -> None:
    network = localize(mlp(), DGL, num_blocks=3, example=X).to(torch.float64)
    assert all(p.dtype == torch.float64 for block in network.blocks for p in block.parameters())
    localgrad.backward(network, X.double(), Y)
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in network.parameters())


def test_the_mode_of_the_model_is_put_back() -> None:
    model = mlp().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    localize(model, DGL, num_blocks=3, example=X)
    assert [module.training for module in model.modules()] == modes


def test_it_says_what_it_is() -> None:
    assert str(localize(mlp(), DGL, num_blocks=2, example=X)) == "Sequential in 2 blocks, beginning at the input, 5"


@pytest.mark.parametrize("method", [localgrad.methods.e2e(TASK), DGL, localgrad.methods.windows(DGL)])
def test_frozen_parameters_at_the_start(method: localgrad.Method) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    network = localize(model, method, num_blocks=3, example=X)
    localgrad.backward(network, X, Y)
    assert [p.grad is not None for p in model.parameters()] == [p.requires_grad for p in model.parameters()]
