"""`localgrad.loss`: its backward pass hands over what the loop computes, whatever a trainer does with a loss."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import localgrad
from gradients import assert_same
from localgrad import localize, methods
from localgrad.errors import TrainingError

TASK = localgrad.tasks.classification(4)
METHODS = {
    "dgl": methods.dgl(TASK),
    "e2e": methods.e2e(TASK),
    "windows": methods.windows(methods.dgl(TASK)),
    "man": methods.man(methods.dgl(TASK)),
    "accumulation": methods.accumulation(methods.dgl(TASK), parts=2),
    "pgl": methods.pgl(methods.dgl(TASK), every=2),
}


def made(name: str = "dgl") -> tuple[localgrad.LocalNetwork, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)]
    x = torch.randn(12, 16)
    return localize(nn.Sequential(*layers, nn.Linear(16, 4)), METHODS[name], 3, example=x), x, torch.arange(12) % 4


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_it_hands_over_what_the_loop_computes(name: str, step: int) -> None:
    network, x, y = made(name)
    losses = localgrad.backward(network, x, y, step)
    expected = gradients(network)
    network.zero_grad()
    loss = localgrad.loss(network, x, y, step)
    assert not gradients(network)
    loss.backward()
    assert_same(gradients(network), expected)
    own = sum(float(value) for span, value in losses.items() if span.stop == network.num_blocks)
    assert float(loss.detach()) == pytest.approx(own, rel=1e-6)
    with torch.no_grad():
        assert float(localgrad.loss(network, x, y, step)) == pytest.approx(own, rel=1e-6)


def test_it_accumulates_scales_and_is_clipped_as_any_loss() -> None:
    network, x, y = made()
    expected: dict[str, Tensor] = {}
    for part in (slice(0, 6), slice(6, 12)):
        network.zero_grad()
        localgrad.backward(network, x[part], y[part])
        for name, gradient in gradients(network).items():
            expected[name] = expected.get(name, torch.zeros_like(gradient)) + gradient / 2
    network.zero_grad()
    for part in (slice(0, 6), slice(6, 12)):
        (localgrad.loss(network, x[part], y[part], scale=2.0**10) / 2).backward()
    assert_same(gradients(network), expected)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)
    assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in expected.values()]).norm()), rel=1e-5)


def test_a_scaler_of_float16_finds_its_factor() -> None:
    network, x, y = made()
    localgrad.backward(network, x, y)
    expected = gradients(network)
    network.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    scaler.scale(localgrad.loss(network, x, y, scale=2.0**8)).backward()
    scaler.unscale_(optimizer)
    assert_same(gradients(network), expected)
    with torch.autocast("cpu", torch.float16), pytest.raises(TrainingError, match=r"scale=scaler.get_scale\(\)"):
        localgrad.loss(network, x, y)
    with pytest.raises(TrainingError, match="under float16"):
        localgrad.loss(network, x, y, autocast=torch.float16)


def test_what_would_be_wrong_is_refused() -> None:
    network, x, y = made()
    loss = localgrad.loss(network, x, y)
    loss.backward(retain_graph=True)
    before = gradients(network)
    with pytest.raises(TrainingError, match="hands its gradients over once"):
        loss.backward()
    assert_same(gradients(network), before)
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(
            localgrad.loss(network, x, y), [next(network.parameters())], create_graph=True, allow_unused=True
        )
        gradient.sum().backward()
    with pytest.raises(TrainingError, match=r"it takes what localgrad\.localize"):
        localgrad.loss(nn.Sequential(network), x, y)
    handle = next(network.parameters()).register_hook(lambda gradient: gradient)
    with pytest.raises(TrainingError, match="has a hook on its gradient"):
        localgrad.loss(network, x, y)
    handle.remove()
    next(network.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(TrainingError, match=r"loop over localgrad\.local_losses"):
        localgrad.loss(network, x, y)


def test_an_error_leaves_the_gradients_that_were_there() -> None:
    network, x, y = made()
    localgrad.loss(network, x, y).backward()
    before = gradients(network)
    with pytest.raises(TrainingError):
        localgrad.loss(network, x, y[:5])
    assert_same(gradients(network), before)


def test_its_memory_is_that_of_the_loop() -> None:
    network, x, y = made()

    def most_saved(step: Callable[[], object]) -> int:
        """Bytes that are saved for backward at one time, at most."""
        now = most = 0

        def count(change: int) -> None:
            nonlocal now, most
            now += change
            most = max(most, now)

        def pack(tensor: Tensor) -> Tensor:
            kept = tensor.detach().view_as(tensor)
            count(kept.nbytes)
            weakref.finalize(kept, count, -kept.nbytes)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            step()
        return most

    loop = most_saved(lambda: localgrad.backward(network, x, y))
    assert 0 < most_saved(lambda: localgrad.loss(network, x, y).backward()) == loop
