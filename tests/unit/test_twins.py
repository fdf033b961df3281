"""Twins against the closed form of an exponential moving average."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import localgrad
from localgrad.errors import MethodError
from localgrad.twins import Twin


def unit() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double()


def frozen() -> nn.Module:
    return unit().requires_grad_(False)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("updates", [1, 2, 25])
def test_a_fixed_source_gives_the_closed_form(decay: float, updates: int) -> None:
    torch.manual_seed(0)
    source, twin = unit(), frozen()
    before = [p.clone() for p in twin.parameters()]
    for _ in range(updates):
        Twin(source, twin, decay).update()
    for start, target, found in zip(before, source.parameters(), twin.parameters(), strict=True):
        expected = decay**updates * start + (1 - decay**updates) * target
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    if decay in (0.0, 1.0):
        wanted = source.parameters() if decay == 0.0 else before
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), wanted, strict=True))


def test_a_moving_source_gives_the_weighted_sum() -> None:
    torch.manual_seed(0)
    source, follower, decay = unit(), frozen(), 0.9
    expected = [p.clone() * decay**10 for p in follower.parameters()]
    twin = Twin(source, follower, decay)
    for n in range(1, 11):
        with torch.no_grad():
            for index, p in enumerate(source.parameters()):
                p.normal_()
                expected[index] += (1 - decay) * decay ** (10 - n) * p
        twin.update()
    for found, wanted in zip(follower.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_buffers_and_the_source_stay_as_they_are() -> None:
    source, follower = unit(), frozen()
    for _ in range(3):
        source(torch.randn(4, 2, 5, 5).double())
        follower(torch.randn(4, 2, 5, 5).double())
    kept = copy.deepcopy((source.state_dict(), dict(follower.named_buffers())))
    Twin(source, follower, 0.25).update()
    assert all(torch.equal(value, kept[0][key]) for key, value in source.state_dict().items())
    assert all(torch.equal(value, kept[1][key]) for key, value in follower.named_buffers())
    assert not torch.equal(follower[1].running_mean, source[1].running_mean)


def test_exchange_moves_every_twin_once_and_builds_no_graph() -> None:
    torch.manual_seed(0)
    pairs = [(unit(), frozen()) for _ in range(2)]
    before = [[p.clone() for p in follower.parameters()] for _, follower in pairs]
    localgrad.exchange(SimpleNamespace(twins=[Twin(a, b, 0.5) for a, b in pairs], stage=None))
    for (source, follower), start in zip(pairs, before, strict=True):
        for p, q, old in zip(source.parameters(), follower.parameters(), start, strict=True):
            torch.testing.assert_close(q, (old + p) / 2, rtol=1e-12, atol=1e-14)
            assert q.grad_fn is None and q.grad is None and p.grad is None


def test_exchange_is_a_function_after_localize() -> None:
    """Not the module of that name, which importing `localgrad.network` binds."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    method = localgrad.methods.dgl(localgrad.tasks.classification(3))
    network = localgrad.localize(model, method, 2, example=torch.randn(4, 4))
    before = copy.deepcopy(network.state_dict())
    localgrad.exchange(network)
    assert network.twins == []
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_unit_without_parameters_has_nothing_to_follow() -> None:
    Twin(nn.ReLU(), nn.ReLU(), 0.9).update()


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_refuses_a_decay_outside_0_to_1(decay: float) -> None:
    with pytest.raises(MethodError, match="between 0 and 1"):
        Twin(unit(), frozen(), decay)


def test_refuses_other_shapes() -> None:
    with pytest.raises(MethodError, match=r"\(4, 2\).*\(3, 2\)"):
        Twin(nn.Linear(2, 3), nn.Linear(2, 4), 0.9)
    with pytest.raises(MethodError, match="must be equal"):
        Twin(nn.Linear(2, 3), nn.Linear(2, 3, bias=False), 0.9)
