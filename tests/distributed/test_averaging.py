"""Replicas that average their weights now and then, by torch's own averager, equal their simulation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

import gang
import localgrad
from zoo import METHODS, batch, build

PERIOD, STEPS = 3, 8


def made(seed: int = 0) -> tuple[localgrad.LocalNetwork, torch.optim.Optimizer]:
    network = build("residual", METHODS["man(dgl)"], 4, seed)
    return network, torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def update(network: localgrad.LocalNetwork, optimizer: torch.optim.Optimizer, replica: int, step: int) -> None:
    x, y = batch(seed=step)
    optimizer.zero_grad(set_to_none=True)
    with localgrad.keyed_randomness(seed=0, replica=replica):
        localgrad.backward(network, x[4 * replica :][:4], y[4 * replica :][:4], step)
    optimizer.step()


def replica_of_two() -> dict[str, torch.Tensor]:
    network, optimizer = made()
    averager = PeriodicModelAverager(period=PERIOD)
    for step in range(STEPS):
        update(network, optimizer, dist.get_rank(), step)
        averager.average_parameters(network.parameters())  # of those that have a gradient
        localgrad.exchange(network)
    return dict(network.state_dict())


@pytest.mark.slow_distributed
def test_weights_averaged_every_few_steps_equal_the_simulation() -> None:
    """Nobody joins or leaves; where replicas do, see test_elastic.py."""
    found = gang.run(replica_of_two, 2)
    pairs = [made() for _ in range(2)]
    networks = [network for network, _ in pairs]
    for step in range(STEPS):
        for replica, (network, optimizer) in enumerate(pairs):
            update(network, optimizer, replica, step)
        if step % PERIOD == 0:
            with torch.no_grad():
                for a, b in zip(*(network.parameters() for network in networks), strict=True):
                    if a.requires_grad:
                        a.copy_(a / 2 + b / 2)
                        b.copy_(a)
        for network in networks:
            localgrad.exchange(network)
    for ours, network in zip(found, networks, strict=True):
        expected = network.state_dict()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(found[0]["model.fc.weight"], found[1]["model.fc.weight"])  # apart since the last average
