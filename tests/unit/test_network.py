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
    ("cutting", "message"),
    [
        (0, "this Sequential has 2 cut points; use 1 to 3 blocks"),
        (-1, "-1"),
        (4, "use 1 to 3 blocks"),
        ("4", "one string"),
        (2.0, "num_blocks=2.0 is a float"),
        (True, "num_blocks=True is a bool"),
        ((), r"\(\)"),
        ([], r"\[\]"),
        ("layer2", r"'layer2' is one string; .*\('layer2',\)"),
        ((3,), r"\(3,\)"),
    ],
)
def test_values_that_do_not_say_where_to_cut(cutting: Any, message: str) -> None:
    with pytest.raises(PartitionError, match=message) as caught:
        localize(mlp(), DGL, cutting, example=X)
    assert "\n" not in str(caught.value)


class _Bare(nn.Module):
    """Parameters of its own, and no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 3), _Bare, lambda: nn.Sequential(nn.Linear(4, 3))])
def test_a_model_without_cut_points_is_one_block(build: Any) -> None:
    model, x, y = build(), torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(PartitionError, match=f"2 blocks, but this {type(model).__name__} has no cut points; it stays"):
        localize(model, DGL, 2, example=x)
    localgrad.backward(localize(model, DGL, 1, example=x), x, y)
    found = [p.grad for p in model.parameters()]
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_unknown_way_to_count_the_stem() -> None:
    with pytest.raises(PartitionError, match="unknown stem 'own '; did you mean 'own'"):
        localize(mlp(), DGL, localgrad.cuts.by_count(2, stem="own "), example=X)


def test_models_that_cannot_be_trained_in_blocks() -> None:
    with pytest.raises(PartitionError, match="ReLU has no parameters"):
        localize(nn.ReLU(), DGL, 1, example=X)
    with pytest.raises(PartitionError, match="model is a builtin_function"):
        localize(torch.relu, DGL, 1, example=X)


def test_a_network_is_not_cut_again() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4)
    method = localgrad.methods.dgl(localgrad.tasks.classification(3))
    network = localize(model, method, 2, example=x)
    with pytest.raises(PartitionError, match=r"pass network\.model"):
        localize(network, method, 2, example=x)
    assert localize(network.model, method, 2, example=x).num_blocks == 2


def test_module_lists_that_are_not_the_model() -> None:
    model = mlp()
    with pytest.raises(PartitionError, match=r"do not compute what Sequential\.forward does"):
        localize(model, DGL, [model[0], model[3], model[5]], example=X)
    with pytest.raises(PartitionError, match="one after the other, do not run: mat1 and mat2"):
        localize(model, DGL, [model[5], model[0]], example=X)
    pair = nn.Sequential(Two(), nn.Identity())
    with pytest.raises(PartitionError, match=r"do not run|do not compute|is no cut point"):
        localize(pair, DGL, [pair[0], pair[1]], example=X)
    with pytest.raises(PartitionError, match="is used by block 0 and by block 1"):
        localize(nn.Sequential(model[0], model[0]), DGL, [model[0], model[0]], example=X)


def test_a_deep_copy_trains_independently() -> None:
    torch.manual_seed(0)
    network = localize(mlp(), DGL, 3, example=X)
    before = copy.deepcopy(network.state_dict())
    other = copy.deepcopy(network)
    own = {id(p) for p in other.parameters()}
    assert {id(p) for k in range(other.num_blocks) for p in other.parameters_of(k)} <= own
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
    network = localize(mlp(), DGL, 3, example=X).to(torch.float64)
    assert all(p.dtype == torch.float64 for k in range(network.num_blocks) for p in network.parameters_of(k))
    localgrad.backward(network, X.double(), Y)
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in network.parameters())


def test_the_mode_of_the_model_is_put_back() -> None:
    model = mlp().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    localize(model, DGL, 3, example=X)
    assert [module.training for module in model.modules()] == modes


def test_it_says_what_it_is() -> None:
    assert str(localize(mlp(), DGL, 2, example=X)) == "Sequential in 2 blocks, beginning at the input, 5"


@pytest.mark.parametrize("method", [localgrad.methods.e2e(TASK), DGL, localgrad.methods.windows(DGL)])
def test_frozen_parameters_at_the_start(method: localgrad.Method) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    network = localize(model, method, 2, example=X)  # what is frozen belongs to the first block that trains
    localgrad.backward(network, X, Y)
    assert [p.grad is not None for p in model.parameters()] == [p.requires_grad for p in model.parameters()]
