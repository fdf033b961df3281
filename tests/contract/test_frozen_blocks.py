"""Blocks of which nothing trains: the others train as if it did, or the cut is refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import localgrad
from localgrad import LocalNetwork, PartitionError, TrainingError, methods
from localgrad.method import Method
from zoo import METHODS, MODELS, batch, build, steps

BLOCKS = 4
ALL = range(BLOCKS)
FROZEN: dict[str, Collection[int]] = {
    "first": [0],
    "middle": [1],
    "two": [1, 2],
    "last": [3],
    "all but the last": ALL[:3],
}


def freeze(network: LocalNetwork, blocks: Collection[int]) -> set[str]:
    """Freeze the model's parameters in some blocks; returns their names."""
    frozen = {id(p) for block in blocks for p in network.parameters_of(block)}
    for parameter in network.model.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    return {name for name, p in network.named_parameters() if id(p) in frozen}


def gradients(network: LocalNetwork) -> dict[str, Tensor]:
    found = {}
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for step in steps(network)[:2]:
        network.load_state_dict(state)
        network.zero_grad(set_to_none=True)
        with localgrad.keyed_randomness(0):
            losses = localgrad.backward(network, *batch(), step)
        assert all(loss.isfinite() for loss in losses.values()) and set(losses) == set(network.spans(step))
        found |= {f"{step} {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return found


@pytest.mark.parametrize("name", METHODS)
def test_the_others_train_as_if_it_did(name: str) -> None:
    network = build("residual", METHODS[name], BLOCKS)
    whole = gradients(network)
    for where, blocks in FROZEN.items():
        frozen = freeze(network, blocks)
        found = gradients(network)
        wanted = {key: value for key, value in whole.items() if key.split(" ")[1] not in frozen}
        assert found.keys() == wanted.keys(), where
        if name == "sgr(dgl)" and 0 in blocks:
            continue  # a block whose input nothing computes has nobody to agree with
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), where


@pytest.mark.parametrize("name", METHODS)
def test_a_block_that_was_frozen_before(name: str) -> None:
    """As one that is frozen afterwards; where a cut would leave nothing to train on one side it is refused."""
    free = build("cnn", METHODS[name], BLOCKS) if name != "trgl(dgl)" else build("residual", METHODS[name], BLOCKS)
    whole = gradients(free)
    cuts = tuple(cut.name for cut in free.cuts)

    def again(frozen: set[str]) -> LocalNetwork:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = MODELS["residual" if name == "trgl(dgl)" else "cnn"]()
            for key, parameter in model.named_parameters():
                parameter.requires_grad_(f"model.{key}" not in frozen)
            return localgrad.localize(model, METHODS[name], cuts, example=batch(2)[0])

    middle = freeze(free, [1])
    found = gradients(again(middle))
    assert all(torch.equal(found[key], whole[key]) for key in found)
    assert {key for key in whole if key.split(" ")[1] not in middle} >= found.keys()
    with pytest.raises(PartitionError, match=f"'{cuts[0]}' takes nothing .*or from frozen ones only"):
        again(freeze(free, [0]))
    with pytest.raises(PartitionError, match=f"'{cuts[-1]}' is no cut point: no parameter from there on trains"):
        again(freeze(free, [3]))


@pytest.mark.parametrize("name", METHODS)
def test_nothing_but_heads_trains(name: str) -> None:
    network = build("residual", METHODS[name], BLOCKS)
    frozen = freeze(network, ALL)
    if any(True for p in network.parameters() if p.requires_grad):
        found = gradients(network)
        assert all(key.split(" ")[1] not in frozen for key in found)
    else:
        with pytest.raises(TrainingError, match="all parameters are frozen"):
            gradients(network)


DGL = METHODS["dgl"]
STEPPING: dict[str, Method] = {
    "blocks": DGL,
    "windows": methods.windows(DGL),
    "micro-batches": methods.accumulation(DGL, parts=2),
    "micro-batches of windows": methods.accumulation(methods.windows(DGL), parts=2),
    "recomputed": methods.checkpointing(methods.windows(DGL)),
    "end to end": METHODS["e2e"],
}


@given(st.sets(st.sampled_from(ALL), max_size=3), st.sampled_from(list(STEPPING)))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_freezing_is_not_stepping(blocks: set[int], name: str) -> None:
    """Each block steps as soon as it is done; a frozen one is one without an optimizer."""
    found = []
    for frozen in (True, False):
        network = build("cnn", STEPPING[name], BLOCKS)
        left = {id(p) for block in blocks for p in network.parameters_of(block)}
        trained = [[p for p in network.block_parameters(k) if id(p) not in left] for k in ALL]
        if frozen:
            freeze(network, blocks)
            trained = [network.block_parameters(k) for k in ALL]
        optimizers = {k: torch.optim.SGD(parameters, lr=0.1) for k, parameters in enumerate(trained) if parameters}

        def done(block: int, optimizers: dict[int, torch.optim.SGD] = optimizers) -> None:
            if block in optimizers:
                optimizers[block].step()
                optimizers[block].zero_grad()

        for step in range(2):
            with localgrad.keyed_randomness(0):
                for _, loss in localgrad.local_losses(network, *batch(), step, on_block_done=done):
                    loss.backward()
        found.append(network.state_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_a_loss_that_is_cut_from_the_block_is_no_frozen_block() -> None:
    def detached(output: Tensor, batch: object) -> Tensor:
        return output.detach().square().mean()

    method = methods.dgl(localgrad.tasks.classification(3))
    method = replace(method, terms=(replace(method.terms[0], loss=detached),))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(4, 4)
    network = localgrad.localize(model, method, 2, example=x)
    with pytest.raises(TrainingError, match=r"span \(0, 1\) depends on no parameter, although block 0 has some"):
        localgrad.backward(network, x, torch.arange(4) % 3)
