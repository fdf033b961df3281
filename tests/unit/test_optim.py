"""Schedules, optimizers, clipping, and when a block steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import localgrad
from bridged import bridged
from localgrad import methods
from localgrad.config import OptimConfig
from localgrad.errors import ConfigError
from localgrad.measure.memory import measure
from localgrad.methods import dgl, e2e, windows
from localgrad.train import optim
from localgrad.train.optim import Stepper, build, clip, learning_rate

TASK = localgrad.tasks.classification(10)


def network_of(method: Any, num_blocks: int = 4) -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    model = localgrad.models.create("resnet8", in_channels=1)
    return localgrad.localize(model, method, num_blocks, example=torch.randn(2, 1, 8, 8)).train()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 1, 8, 8, generator=generator), torch.randint(10, (12,), generator=generator))
        for _ in range(count)
    ]


def stepper_of(network: localgrad.LocalNetwork, **options: Any) -> Stepper:
    return Stepper(network, OptimConfig(**options), torch.amp.GradScaler("cpu", enabled=False))


def train(network: localgrad.LocalNetwork, stepper: Stepper, count: int = 3) -> None:
    for step, (x, y) in enumerate(batches(count)):
        for _, loss in localgrad.local_losses(network, x, y, step, on_block_done=stepper.block_done):
            loss.backward()
        stepper.finish(step)
        localgrad.exchange(network)


def paper_schedule(base: float, epochs: int) -> list[float]:
    """`adjust_learning_rate` of the papers' scripts, written out for epochs 1 .. E."""
    rates = []
    for e in range(1, epochs + 1):
        rate = 0.5 * base * (1 + math.cos(math.pi * e / epochs))
        if e <= 10:
            rate = rate * (e - 1) / 10 + 0.01 * (11 - e) / 10
        rates.append(rate)
    return rates


@pytest.mark.parametrize(("base", "epochs"), [(0.8, 400), (0.8, 160), (0.1, 400), (0.8, 11)])
def test_the_papers_schedule(base: float, epochs: int) -> None:
    config = OptimConfig(lr=base, schedule="paper")
    expected = paper_schedule(base, epochs)
    for share in (0.0, 0.5, 0.99):  # constant within an epoch
        assert [learning_rate(config, e, share, epochs) for e in range(epochs)] == pytest.approx(expected, abs=1e-15)
    assert expected[0] == pytest.approx(0.01) and expected[-1] == pytest.approx(0.0, abs=1e-15)


def test_cosine_warm_up_and_constant() -> None:
    cosine = OptimConfig(lr=0.2)
    assert learning_rate(cosine, 0, 0.0, 10) == 0.2
    assert learning_rate(cosine, 5, 0.0, 10) == pytest.approx(0.1)
    assert learning_rate(cosine, 2, 0.5, 10) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)))
    assert 0 < learning_rate(cosine, 9, 0.99, 10) < 1e-5
    warm = OptimConfig(lr=0.2, warmup_epochs=2)
    rising = [learning_rate(warm, e, s, 10) for e in (0, 1) for s in (0.0, 0.5)]
    assert rising == sorted(rising) and 0 < rising[0] < 0.002 and rising[2] == pytest.approx(0.1, rel=0.02)
    assert learning_rate(warm, 2, 0.0, 10) == 0.2
    assert learning_rate(warm, 6, 0.0, 10) == pytest.approx(0.1)
    assert learning_rate(OptimConfig(lr=0.2, warmup_epochs=5), 4, 0.5, 5) < 0.2  # warm-up as long as the run
    constant = OptimConfig(lr=0.2, schedule="constant")
    assert {learning_rate(constant, e, s, 10) for e in range(10) for s in (0.0, 0.9)} == {0.2}


def test_optimizers_are_as_configured() -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]
    sgd = build(OptimConfig(lr=0.3, momentum=0.8, weight_decay=0.01), weights)
    assert isinstance(sgd, torch.optim.SGD)
    assert {k: sgd.defaults[k] for k in ("lr", "momentum", "nesterov", "weight_decay")} == {
        "lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01,
    }  # fmt: skip
    assert not build(OptimConfig(momentum=0.0), weights).defaults["nesterov"]  # torch refuses it
    plain = build(OptimConfig(options={"nesterov": False}), weights).defaults
    assert (plain["momentum"], plain["nesterov"]) == (0.9, False)
    adamw = build(OptimConfig(name="adamw"), weights)
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name", ["NAdam", "torch.optim:NAdam"])
def test_any_optimizer_by_name_steps_as_torch_does(name: str) -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)) for _ in range(2))
    built = build(OptimConfig(name=name, lr=0.1, weight_decay=0.02, options={"betas": (0.5, 0.8)}), [ours])
    literal = torch.optim.NAdam([theirs], lr=0.1, weight_decay=0.02, betas=(0.5, 0.8))
    for _ in range(3):
        for weight, optimizer in ((ours, built), (theirs, literal)):
            optimizer.zero_grad()
            (weight**4).sum().backward()
            optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "NAdm"}, "NAdam"),
        ({"name": "torch.optim:Nothing"}, "has no 'Nothing'"),
        ({"name": "torch.nn:Linear"}, "it is no optimizer"),
        ({"name": "LBFGS"}, "runs the model again"),
        ({"name": "NAdam", "options": {"beta": 1}}, "its arguments are"),
        ({"name": "NAdam", "options": {"lr": 1}}, "write optim.lr"),
        ({"options": {"dampening": 0.1}}, "zero dampening"),
        ({"name": "NAdam", "momentum": 0.9}, "is that of sgd; write optim.options.momentum=0.9"),
        ({"name": "torchao.nowhere:AdamW"}, r"no module 'torchao.nowhere'.*pip install localgrad\[eightbit\]"),
    ],
)
def test_optimizers_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(OptimConfig(**options), [torch.nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize(
    "method",
    [
        dgl(TASK),
        windows(dgl(TASK)),
        windows(dgl(TASK), width=3, local=0.0),
        methods.man(dgl(TASK)),
        bridged(dgl(TASK), mix="scaled", exchange="before", buffers="ema"),
        methods.mlaan(windows(dgl(TASK, head="linear"), stride=2, ends="cascade")),
        methods.local_critic(TASK),
        methods.accumulation(dgl(TASK), parts=3),
        methods.accumulation(windows(dgl(TASK)), parts=2),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_stepping_block_by_block_gives_the_same_weights(method: Any, name: Any) -> None:
    together, apart = network_of(method), network_of(method)
    train(together, stepper_of(together, name=name, lr=0.05))
    train(apart, stepper_of(apart, name=name, lr=0.05, per_block=True))
    for (key, a), b in zip(together.state_dict().items(), apart.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert not torch.equal(apart.model.fc.weight, network_of(method).model.fc.weight)


@pytest.mark.parametrize(
    "method", [dgl(TASK), windows(dgl(TASK)), methods.accumulation(dgl(TASK), parts=2)], ids=lambda m: m.name
)
def test_stepping_block_by_block_frees_gradients(method: Any) -> None:
    peaks = {}
    for per_block in (False, True):
        network = network_of(method)
        stepper = stepper_of(network, lr=0.05, per_block=per_block)
        train(network, stepper, 1)  # momentum exists from here on
        parameters = list(network.parameters())
        assert all(p.grad is None for p in parameters)
        peaks[per_block] = measure(lambda n=network, s=stepper: train(n, s, 1), parameters).peak_total
    assert peaks[True] < peaks[False]


@pytest.mark.parametrize("method", [e2e(TASK), methods.checkpointing(e2e(TASK))], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["sgd", "adamw", "NAdam"])
def test_stepping_in_the_backward_pass_gives_the_same_weights_and_frees_gradients(method: Any, name: str) -> None:
    networks, peaks = [], []
    for in_backward in (False, True):
        network = network_of(method)
        stepper = stepper_of(network, name=name, lr=0.05, in_backward=in_backward)
        stepper.set_learning_rate(0.04)
        train(network, stepper, 2)
        parameters = list(network.parameters())
        assert all(p.grad is None for p in parameters)
        memory = measure(lambda n=network, s=stepper: train(n, s, 1), parameters, timeline=True)
        peaks.append(max(gradients for _, gradients in memory.timeline))
        networks.append(network.state_dict())
    for key, a in networks[0].items():
        assert torch.equal(a, networks[1][key]), key
    assert peaks[0] == sum(4 * p.numel() for p in parameters)
    assert max(4 * p.numel() for p in parameters) <= peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (dgl(TASK), {}, "dgl has several losses a step; write optim.per_block=true"),
        (methods.deep_supervision(TASK), {}, "several losses"),
        (methods.pgl(dgl(TASK), every=2), {}, "several losses"),
        (methods.accumulation(e2e(TASK), parts=2), {}, "each of 2 micro-batches"),
        (e2e(TASK), {"per_block": True}, "drop one of both"),
        (e2e(TASK), {"clip_grad": 1.0}, "all gradients at once"),
    ],
)
def test_what_cannot_step_in_the_backward_pass_is_refused(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stepper_of(network_of(method), in_backward=True, **options)


def test_loss_scaling_is_refused_in_the_backward_pass() -> None:
    with pytest.raises(ConfigError, match="write bf16"):
        Stepper(network_of(e2e(TASK)), OptimConfig(in_backward=True), torch.amp.GradScaler("cpu", enabled=True))


class Rated(torch.optim.SGD):
    """Keeps its rate in a tensor and takes further arguments, as optimizers do that compile their step."""

    def __init__(self, params: Any, lr: float, **further: Any) -> None:
        super().__init__(params, lr=torch.tensor(lr), **further)


def test_a_rate_in_a_tensor_stays_there_and_weight_decay_goes_with_further_arguments() -> None:
    network = network_of(e2e(TASK))
    stepper = stepper_of(network, name="unit.test_optim:Rated", lr=0.5, weight_decay=0.125)
    ((group,),) = (optimizer.param_groups for optimizer in stepper.optimizers)
    rate = group["lr"]
    stepper.set_learning_rate(0.25)
    assert group["lr"] is rate and rate.item() == 0.25 and group["weight_decay"] == 0.125


def test_groups_are_clipped_as_torch_clips_each() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [[(3, 4), (5,)], [], [(2, 2)], [(7,)]]
    groups = [[torch.nn.Parameter(torch.zeros(shape)) for shape in group] for group in shapes]
    for scale, group in zip((10.0, 1.0, 0.1, 3.0), groups, strict=True):
        for parameter in group:
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    groups[3].append(torch.nn.Parameter(torch.zeros(2)))  # which got none
    unclipped = [[None if p.grad is None else p.grad.clone() for p in group] for group in groups]
    clip(groups, 1.0)
    for group, gradients in zip(groups, unclipped, strict=True):
        ours = [p.grad for p in group]
        for parameter, gradient in zip(group, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(group, 1.0)
        for a, b in zip(ours, group, strict=True):
            assert b.grad is None if a is None else torch.equal(a, b.grad)
    assert ours[0].norm() == pytest.approx(1.0)  # of the last group, which was longer
    clip([[torch.nn.Parameter(torch.zeros(2))]], 1.0)  # nothing to clip


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_stepping_small_networks_at_once_gives_the_same_weights(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    once, one_by_one = network_of(dgl(TASK)), network_of(dgl(TASK))
    at_once = stepper_of(once, name=name, lr=0.05, clip_grad=1.0)
    monkeypatch.setattr(optim, "SMALL", 0)
    alone = stepper_of(one_by_one, name=name, lr=0.05, clip_grad=1.0)
    assert [s.optimizers[0].defaults["foreach"] for s in (at_once, alone)] == [True, None]
    assert build(OptimConfig(per_block=True), [torch.nn.Parameter(torch.ones(2))]).defaults["foreach"] is None
    train(once, at_once)
    train(one_by_one, alone)
    for (key, a), b in zip(once.state_dict().items(), one_by_one.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def gradients(method: Any) -> list[list[Tensor]]:
    """Of each block, unclipped."""
    network = network_of(method)
    x, y = batches(1)[0]
    localgrad.backward(network, x, y)
    return [[p.grad.clone() for p in network.block_parameters(k) if p.grad is not None] for k in range(4)]


@pytest.mark.parametrize(
    ("method", "groups"),
    [(dgl(TASK), [[0], [1], [2], [3]]), (e2e(TASK), [[0, 1, 2, 3]]), (windows(dgl(TASK)), [[0, 1, 2, 3]])],
)
@pytest.mark.parametrize("per_block", [False, True])
def test_clipping_is_by_group_of_blocks(method: Any, groups: list[list[int]], per_block: bool) -> None:
    if per_block and len(groups) == 1:
        with pytest.raises(ConfigError, match=r"per_block with optim\.clip_grad"):
            stepper_of(network_of(method), clip_grad=0.1, per_block=True)
        return
    limit = 0.1
    found = gradients(method)
    network = network_of(method)
    before = [[p.detach().clone() for p in network.block_parameters(k)] for k in range(4)]
    plain = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip_grad": limit, "per_block": per_block}
    train(network, stepper_of(network, **plain), 1)
    for group in groups:
        norm = math.sqrt(sum(g.double().square().sum().item() for k in group for g in found[k]))
        assert norm > limit  # or nothing would be tested
        for k in group:
            for old, new, g in zip(before[k], network.block_parameters(k), found[k], strict=True):
                torch.testing.assert_close(old - new, g * (limit / (norm + 1e-6)), rtol=1e-3, atol=1e-6)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    """Where nothing looks across samples; a model of linear layers."""

    def gradient(method: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10)).double()
        x, y = torch.randn(7, 4).double(), torch.randint(10, (7,))
        network = localgrad.localize(model, method, 2, example=x)
        localgrad.backward(network, x, y)
        return [p.grad for p in model.parameters() if p.grad is not None]

    whole, parts = gradient(e2e(TASK)), gradient(methods.accumulation(e2e(TASK), parts=3))
    assert len(whole) == 4
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_a_block_with_nothing_to_train_is_refused_block_by_block() -> None:
    network = network_of(dgl(TASK))
    for p in network.block_parameters(3):
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match="block 3 has nothing to train"):
        stepper_of(network, per_block=True)
    stepper_of(network)
