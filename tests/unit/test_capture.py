"""Captured steps: everything but CUDA itself, for which a tape stands (`tape.Tape`)."""

from __future__ import annotations

import functools
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import localgrad
from localgrad.config import validate
from localgrad.errors import ConfigError, TrainingError
from localgrad.method import Method
from localgrad.recipes import merge
from localgrad.train import capture, loop
from localgrad.train.capture import Captured
from localgrad.train.experiment import Experiment, build, captures
from tape import Listening, Tape

SETTINGS: dict[str, Any] = {
    "method": ["dgl", "man"],
    "model": {"name": "resnet8"},
    "data": {"name": "digits", "limit": 260},
    "blocks": {"num_blocks": 3},
    "optim": {"lr": 0.05, "clip_grad": 5.0},
    "train": {"epochs": 2, "batch_size": 32, "threads": 1, "ema_decay": 0.9, "device": "cpu"},
}
TASK = localgrad.tasks.classification(3)
X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def settings(**changes: Any) -> Any:
    return validate(merge(SETTINGS, changes), "test")


def finished(run: Experiment) -> Experiment:
    loop.train(run, lambda _: None, lambda _: None)
    return run


def small(method: Method | None = None, model: nn.Module | None = None) -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    return localgrad.localize(model, method or localgrad.methods.dgl(TASK), 2, example=X).train()


def stepping(network: localgrad.LocalNetwork) -> Callable[..., dict[str, float]]:
    def step(number: int, x: Tensor, y: Tensor) -> Any:
        losses = localgrad.backward(network, x, y, number)
        network.zero_grad(set_to_none=True)
        return {str(span): loss for span, loss in losses.items()}

    return step


def test_calls_warm_up_record_and_replay_on_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    tape, seen = Tape(monkeypatch), []

    def step(number: int, x: Tensor) -> Tensor:
        seen.append((number, x))
        return x.sum() + 1

    captured = Captured(small(), step, warm_up=2, record=tape)
    given = [torch.full((3,), float(k)) for k in range(6)]
    results = [captured(k, x).item() for k, x in enumerate(given)]
    assert results == [3.0 * k + 1 for k in range(6)]
    assert (tape.recorded, tape.replayed) == (1, 4)
    assert [number for number, _ in seen] == [0, 1, 2] and seen[0][1] is given[0] and seen[2][1] is not given[2]
    for size in range(4, 20):  # other forms have graphs of their own, as many as there is room for
        for _ in range(4):
            assert captured(6, torch.ones(size)).item() == size + 1
    assert tape.recorded == len(captured.kinds) == capture.MOST_GRAPHS
    assert str(captured) == f"8 CUDA graphs, {tape.replayed} of 70 steps replayed"


def test_replayed_steps_draw_what_they_draw_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step its own numbers, whatever was drawn before it, also in a step that replays out of order."""
    network = small()
    step = stepping(network)
    captured = Captured(network, step, warm_up=1, record=Tape(monkeypatch))
    with localgrad.keyed_randomness(3):
        plain = [{name: loss.item() for name, loss in step(k, X, Y).items()} for k in range(6)]
        assert len({str(losses) for losses in plain}) == 6
        for k in (0, 1, 4, 2, 5, 3, 0):
            torch.rand(1)
            assert {name: loss.item() for name, loss in captured(k, X, Y).items()} == plain[k]
    assert captured.replayed == 6 and captured.reason == ""
    (kind,) = captured.kinds.values()
    assert [place[0] for place in kind.draws.generators] == ["block"]  # the head has no dropout, and no generator


def test_elsewhere_than_on_cuda_a_warning_says_so() -> None:
    with pytest.warns(UserWarning, match="on the cpu it runs as it is"):
        captured = Captured(small(), lambda number, x: x + 1)
    assert [captured(k, torch.full((1,), float(k))).item() for k in range(6)] == [k + 1.0 for k in range(6)]


class Counts(nn.Linear):
    """Keeps how often it ran, as a number or as a new tensor."""

    def __init__(self, start: Any) -> None:
        super().__init__(4, 8)
        self.ran = start

    def forward(self, x: Tensor) -> Tensor:
        self.ran = self.ran + 1
        return super().forward(x)


class Draws(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (random.random() + torch.rand(()))


class Breaks(nn.Linear):
    """Does what cannot be recorded."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(_get_current_dispatch_mode(), Listening):
            raise RuntimeError("not while a stream is recorded\nand more")
        return super().forward(x)


def ramp(output: Tensor, batch: localgrad.Batch) -> Tensor:
    return TASK.loss(output, batch) * min(1.0, batch.step / 10)


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (Counts(0), r"puts another value into Counts\.ran"),
        (Counts(torch.zeros(())), r"puts another value into Counts\.ran"),
        (Draws(4, 8), "draws random numbers on the host"),
        (Breaks(4, 8), "cannot be recorded: not while a stream is recorded$"),
    ],
    ids=["number", "tensor", "host", "breaks"],
)
def test_what_a_graph_would_not_repeat_runs_as_it_is(
    first: nn.Module, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small(model=nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3)))
    ran: list[int] = []

    def step(number: int, x: Tensor, y: Tensor) -> None:
        localgrad.backward(network, x, y, number)
        ran.append(number)
        network.zero_grad(set_to_none=True)

    for insist in (False, True):
        ran.clear()
        captured = Captured(network, step, warm_up=2, insist=insist, record=Tape(monkeypatch))
        if insist:
            with pytest.raises(TrainingError, match=f"train.capture=true, but a step {reason.rstrip('$')}"):
                for number in range(5):
                    captured(number, X, Y)
        else:
            for number in range(5):
                captured(number, X, Y)
            assert ran == [0, 1, 2, 3, 4] and captured.replayed == 0
            assert str(captured).startswith("0 CUDA graphs, 0 of 5 steps replayed; others run as they are, as a step")
            assert re.search(reason, captured.reason)
        assert all(p.grad is None for p in network.parameters())


def test_a_loss_that_changes_from_step_to_step_is_no_graph() -> None:
    dgl = localgrad.methods.dgl(TASK)
    for loss in (ramp, functools.partial(ramp), lambda output, batch: TASK.loss(output, batch) * (1 + batch.step)):
        method = replace(dgl, terms=(replace(dgl.terms[0], loss=loss),))
        assert capture.unfit(replace(dgl, final_loss=loss)) == capture.unfit(method)
        assert "has a loss that reads batch.step" in capture.unfit(method)
        run = small(method)
        assert captures(settings(train={"capture": "auto"}), run) == (False, "")  # on the CPU without a word
        with pytest.raises(ConfigError, match=r"a loss that reads batch\.step"):
            captures(settings(train={"capture": True}), run)
        captured = Captured(run, stepping(run), warm_up=0, record=pytest.fail)
        captured(0, X, Y)
        assert captured.reason == capture.unfit(method)
        with pytest.raises(TrainingError, match=r"a loss that reads batch\.step"):
            Captured(run, stepping(run), insist=True, record=pytest.fail)
    for task in (
        TASK,
        localgrad.tasks.segmentation(3),
        localgrad.tasks.multilabel(3),
        localgrad.tasks.regression(3),
        localgrad.tasks.custom(nn.functional.mse_loss, 3),
    ):
        assert capture.unfit(localgrad.methods.dgl(task)) == ""
    waiting = localgrad.methods.accumulation(dgl, parts=2, wait="host")
    assert capture.unfit(waiting) == "lets features wait on the host"


@pytest.mark.parametrize("changes", [{}, {"optim": {"name": "adamw", "lr": 0.002}}, {"optim": {"per_block": True}}])
def test_a_captured_run_is_the_plain_run(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(**merge({"train": {"capture": True, "epochs": 3}}, changes))
    with pytest.warns(UserWarning, match="on the cpu it runs as it is"):
        plain = finished(build(config))
    run = build(config)
    monkeypatch.setattr(loop, "Captured", functools.partial(Captured, warm_up=1))
    monkeypatch.setattr(loop, "captured_step", functools.partial(loop.captured_step, record=Tape(monkeypatch)))
    finished(run)
    assert run.captured is not None and plain.captured is not None
    assert str(run.captured) == f"2 CUDA graphs, {run.step - 2} of {run.step} steps replayed"
    assert plain.captured.replayed == 0
    for (name, a), b in zip(plain.evaluated.state_dict().items(), run.evaluated.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [row["train"] for row in plain.history] == [row["train"] for row in run.history]
    assert all(0 <= score <= 1 for row in run.history for score in row["train"]["score"].values())
    assert plain.meter.state_dict() == run.meter.state_dict()


def test_a_recording_that_fails_counts_its_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(train={"capture": "auto", "epochs": 1})
    plain, run = finished(build(config)), build(config)

    def failing(work: Callable[[], Any], generators: Any) -> Any:
        work()
        raise RuntimeError("out of memory, say")

    captured = loop.captured_step(run, failing)
    run.network.train()
    for inputs, targets in run.data.train.epoch(0):
        captured(inputs, targets)
        run.meter.end_batch()
    assert run.captured is not None and "cannot be recorded: out of memory, say" in run.captured.reason
    read = plain.history[0]["train"]
    samples = run.meter.state_dict()["samples"]
    assert samples == dict.fromkeys(read["score"], run.data.train.num_samples)


def test_auto_is_silent_on_a_cpu() -> None:
    run = build(settings(train={"epochs": 1}))
    assert run.config.train.capture == "auto" and run.stepper.rate is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finished(run)
    assert run.captured is None and run.capture_remark == ""


def test_the_rate_on_the_device_is_the_rate() -> None:
    plain, run = build(settings()), build(settings(train={"capture": True}))
    assert isinstance(run.stepper.optimizers[0].param_groups[0]["lr"], Tensor)
    with pytest.warns(UserWarning, match="on the cpu"):
        finished(run)
    finished(plain)
    for a, b in zip(plain.network.parameters(), run.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # it is rounded to float32


def test_half_precision_that_scales_its_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="a step scales fp16 losses"):
        build(settings(train={"capture": True, "precision": "fp16"}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [["dgl", "man"], ["dgl", {"pgl": {"every": 3}}]])
def test_cuda_graphs_are_the_plain_run(method: list[Any]) -> None:
    changes = {"method": method, "train": {"device": "cuda", "epochs": 4}}
    plain = finished(build(settings(**merge(changes, {"train": {"capture": False}}))))
    run = finished(build(settings(**changes)))  # auto
    assert run.captured is not None and run.captured.reason == "" and run.captured.replayed > run.step / 3
    for (name, a), b in zip(plain.evaluated.state_dict().items(), run.evaluated.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)
    assert plain.history[-1]["train"]["score"] == pytest.approx(run.history[-1]["train"]["score"], abs=0.05)
    assert all(score <= 1 for score in run.history[-1]["train"]["score"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_draw_what_steps_draw_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).cuda()
    network = localgrad.localize(model, localgrad.methods.dgl(TASK), 2, example=X.cuda()).train()
    step, batch = stepping(network), (X.cuda(), Y.cuda())
    captured = Captured(network, step)
    with localgrad.keyed_randomness(3):
        plain = [{name: loss.item() for name, loss in step(k, *batch).items()} for k in range(6)]
        for k in (0, 1, 2, 4, 3, 5, 0):
            found = {name: loss.item() for name, loss in captured(k, *batch).items()}
            assert found == pytest.approx(plain[k], rel=1e-5)
    assert (captured.replayed, captured.reason) == (4, "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_that_waits_for_the_device_is_found_before_it_is_recorded() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).cuda()
    network = localgrad.localize(model, localgrad.methods.dgl(TASK), 2, example=X.cuda()).train()

    def step(number: int, x: Tensor, y: Tensor) -> float:
        return sum(loss.item() for loss in localgrad.backward(network, x, y, number).values())

    captured = Captured(network, step)
    for number in range(5):
        captured(number, X.cuda(), Y.cuda())
    assert "waits for the device (test_capture.py, line " in captured.reason and captured.replayed == 0
