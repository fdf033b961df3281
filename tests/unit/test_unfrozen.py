"""Weights that are unfrozen after `localgrad.localize`: gradients of a network that is cut afterwards, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.methods import dgl, local_critic
from localgrad.spans import Span

BASE = dgl(localgrad.tasks.classification(3), head="linear")


def data(samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(samples, 8, generator=generator, dtype=torch.float64), torch.arange(samples) % 3


class Queries(nn.Module):
    """Every layer adds learned queries, as they are or once they have saved something for the way back."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made, self.query, self.head = made, nn.Parameter(torch.randn(1, 8)), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query = self.made(self.query).expand(len(x), -1)
        for layer in self.layers:
            x = torch.tanh(layer(x) + query)
        return self.head(x)


def cut(model: nn.Module, cuts: Any = ("layers.2",), method: localgrad.Method = BASE) -> localgrad.LocalNetwork:
    torch.manual_seed(1)
    return localgrad.localize(model.double(), method, cuts, example=data(2)[0])


def gradients(network: localgrad.LocalNetwork) -> dict[str, Tensor | None]:
    network.zero_grad(set_to_none=True)
    localgrad.backward(network, *data())
    return {name: p.grad for name, p in network.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or (other is not None and torch.equal(gradient, other)), name


@pytest.mark.parametrize("made", [torch.clone, torch.tanh])
@pytest.mark.parametrize("stepped", [False, True])  # whether there was a step before
def test_what_is_made_of_unfrozen_weights_is_cut_too(made: Callable[[Tensor], Tensor], stepped: bool) -> None:
    torch.manual_seed(0)
    model = Queries(made)
    model.query.requires_grad_(False)
    network = cut(model)
    if stepped:
        gradients(network)
    model.query.requires_grad_(True)
    expected = gradients(cut(copy.deepcopy(model)))
    for _ in range(2):
        found = gradients(network)
        assert_same(found, expected)

    x, y = data()
    query, (first, second, *_) = made(model.query).expand(6, -1), model.layers
    features = torch.tanh(second(torch.tanh(first(x) + query)) + query)
    loss = F.cross_entropy(network.auxiliary_of(Span(0, 1))(features, 0)[0], y)
    literal = torch.autograd.grad(loss, model.query)[0]
    torch.testing.assert_close(found["model.query"], literal, rtol=0, atol=1e-12)


def test_parts_that_train_in_turns() -> None:
    """What was found with one of them is not forgotten with the other."""
    torch.manual_seed(0)
    model = Queries(torch.tanh)
    network, other = cut(model), model.layers[3].weight
    expected = gradients(network)
    del network
    for parameter in (model.query, other):
        parameter.requires_grad_(False)
    network = cut(model)
    for turn in (0, 1, 0, 1):
        model.query.requires_grad_(turn == 0)
        other.requires_grad_(turn == 1)
        found = gradients(network)
        assert (found["model.query"] is None) == (turn == 1)
        assert_same({**expected, **{n: g for n, g in found.items() if g is not None}}, expected)


def test_rules_follow_too() -> None:
    """Rules take no part in the rehearsal, which has no targets."""
    torch.manual_seed(0)
    model = Queries(torch.tanh)
    model.query.requires_grad_(False)
    network = cut(model, method=local_critic(localgrad.tasks.classification(3)))
    model.query.requires_grad_(True)
    expected = gradients(cut(copy.deepcopy(model), method=network.method))
    assert_same(gradients(network), expected)


def test_a_network_is_unfrozen_from_its_end() -> None:
    """Blocks have no layer in common, so nothing has to be found; cuts by number stay what they were."""
    torch.manual_seed(0)
    model = localgrad.models.resnet8(3)
    units = [model.get_submodule(name) for name in ("conv1", "layer1", "layer2")]
    for unit in units:
        unit.requires_grad_(False)
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4) % 3
    network = localgrad.localize(model.double(), BASE, ("layer2", "layer3"), example=x[:2])
    for unit in reversed(units):
        unit.requires_grad_(True)
        localgrad.backward(network, x, y)
    assert network.known == {name for name, _ in model.named_parameters()}


def test_unfrozen_weights_that_leave_no_such_cut_are_refused() -> None:
    class Aside(Queries):
        """What is made of the queries waits for the second block, so no block would train them."""

        def forward(self, x: Tensor) -> Tensor:
            aside = self.made(self.query)
            for number, layer in enumerate(self.layers):
                x = torch.tanh(layer(x) + aside if number > 1 else layer(x))
            return self.head(x)

    class Shared(Queries):
        """Both blocks read the queries."""

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x) + self.query)
            return self.head(x)

    for kind, said in ((Aside, "other cuts|no cut point"), (Shared, "used before and after")):
        model = kind(torch.tanh)
        model.query.requires_grad_(False)
        network = cut(model)
        gradients(network)
        model.query.requires_grad_(True)
        for _ in range(2):
            with pytest.raises(
                localgrad.PartitionError, match=f"'query' was unfrozen .* call localize again.*({said})"
            ):
                gradients(network)
        model.query.requires_grad_(False)
        gradients(network)


def test_resident_networks_are_cut_again() -> None:
    model = Queries(torch.tanh)
    model.query.requires_grad_(False)
    network = cut(model)
    localgrad.resident(network, "cpu")
    model.query.requires_grad_(True)
    with pytest.raises(localgrad.PartitionError, match="call localize again, then block_parallel or resident"):
        gradients(network)
