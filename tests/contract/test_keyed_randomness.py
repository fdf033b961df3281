"""Draws depend on seed, block, step, micro-batch and replica, and on nothing that happened before."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import localgrad
from localgrad import TrainingError
from zoo import METHODS, MODELS, batch, build

EVERY = pytest.mark.parametrize("name", METHODS)


def run(
    network: localgrad.LocalNetwork, before: int, step: int = 0, seed: int = 0, replica: int = 0
) -> dict[str, Tensor]:
    """Gradients of one step in a process that drew something else before; checks that it may go on where it was."""
    network.zero_grad(set_to_none=True)
    torch.manual_seed(before)
    state = torch.get_rng_state()
    with localgrad.keyed_randomness(seed, replica):
        localgrad.backward(network, *batch(), step)
    assert torch.equal(torch.get_rng_state(), state)
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@EVERY
@pytest.mark.parametrize("model", ["residual"])
def test_gradients_depend_on_the_keys_alone(name: str, model: str) -> None:
    network = build(model, METHODS[name], 3)
    first = run(network, before=1)
    assert same(first, run(network, before=2))
    assert not same(first, run(network, before=1, step=1))
    assert not same(first, run(network, before=1, seed=1))
    assert not same(first, run(network, before=1, replica=1))


def masks(network: localgrad.LocalNetwork, step: int = 0) -> list[Tensor]:
    """Where each dropout layer let values through, in the order they ran."""
    seen: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _, args, out: seen.append((out == 0) & (args[0] != 0)))
        for m in network.model.modules()
        if isinstance(m, nn.Dropout | nn.Dropout2d)
    ]
    with localgrad.keyed_randomness(5):
        localgrad.backward(network, *batch(), step)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("model", MODELS)
def test_methods_share_the_masks_of_each_block(model: str) -> None:
    """Only the seed of a block matters, so gradient flow can be compared with everything else equal."""
    expected = masks(build(model, METHODS["e2e"], 4))
    assert expected and any(mask.any() for mask in expected)
    for name in ("dgl", "windows(dgl)", "deep_supervision"):
        found = masks(build(model, METHODS[name], 4))
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
    assert not all(
        torch.equal(a, b) for a, b in zip(masks(build(model, METHODS["e2e"], 4), step=1), expected, strict=True)
    )


def test_checkpointing_runs_all_but_the_last_block_twice_with_the_same_masks() -> None:
    gradients = []
    for name, runs in (("e2e", 1), ("checkpointing(e2e)", 2)):
        network = build("cnn", METHODS[name], 5)
        counts = [0] * 5
        for index, unit in enumerate(network.model.units):
            unit[0].register_forward_hook(
                lambda *_, index=index, counts=counts: counts.__setitem__(index, counts[index] + 1)
            )
        gradients.append(run(network, before=1))
        assert counts == [runs] * 4 + [1]
    assert same(*gradients)


def test_micro_batches_draw_different_masks() -> None:
    found = masks(build("cnn", localgrad.methods.accumulation(METHODS["e2e"], parts=2), 1))
    assert len(found) == 10 and not torch.equal(found[0], found[5])


def test_without_keys_draws_come_from_the_global_generator() -> None:
    network = build("cnn", METHODS["dgl"], 3)
    found = []
    for seed in (0, 0, 1):
        network.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        localgrad.backward(network, *batch())
        found.append(network.model.units[0][0].weight.grad)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def in_thread(act: Callable[[], object]) -> list[BaseException]:
    """What ``act`` raises in another thread."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except TrainingError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


def test_two_threads_are_refused_whenever_they_meet() -> None:
    """Torch's generators belong to the process: the second thread is turned away, the first one draws as alone."""
    network, other = (build("cnn", METHODS["dgl"], 3) for _ in range(2))
    alone = run(network, before=1)
    network.zero_grad(set_to_none=True)
    with localgrad.keyed_randomness(0):
        for _, loss in localgrad.local_losses(network, *batch()):
            (error,) = in_thread(lambda: run(other, before=2))
            assert "two threads train under keyed_randomness" in str(error)
            context = contextvars.copy_context()
            (error,) = in_thread(lambda context=context: context.run(localgrad.backward, other, *batch()))
            assert "two threads train under keyed_randomness" in str(error)
            loss.backward()
    assert same({name: p.grad for name, p in network.named_parameters() if p.grad is not None}, alone)


def test_threads_one_after_the_other() -> None:
    """A thread that has left, or has died inside, is in nobody's way; one may enter again inside."""
    network = build("cnn", METHODS["dgl"], 3)
    alone = run(network, before=1)
    assert not in_thread(lambda: run(network, before=2))
    assert not in_thread(lambda: localgrad.keyed_randomness(1).__enter__())
    with localgrad.keyed_randomness(1):
        assert same(run(network, before=3), alone)
    assert same(run(network, before=3), alone)
