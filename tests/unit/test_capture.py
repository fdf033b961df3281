"""Captured steps: everything but the capture itself, which needs a CUDA device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from localgrad.config import validate
from localgrad.errors import ConfigError
from localgrad.recipes import merge
from localgrad.train import loop
from localgrad.train.capture import Captured
from localgrad.train.experiment import Experiment, build

SETTINGS: dict[str, Any] = {
    "method": ["dgl", "man"],
    "model": {"name": "resnet8"},
    "data": {"name": "digits", "limit": 260},
    "blocks": {"num_blocks": 3},
    "optim": {"lr": 0.05, "clip_grad": 5.0},
    "train": {"epochs": 2, "batch_size": 32, "threads": 1, "ema_decay": 0.9},
}


def settings(**changes: Any) -> Any:
    return validate(merge(SETTINGS, changes), "test")


class Recorder:
    """Stands for a CUDA graph: recording runs nothing for good, a replay does the device's part of the work."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        output = torch.zeros(())

        def replay() -> None:
            self.replayed += 1
            output.copy_(work())

        return replay, output


def test_calls_warm_up_record_and_replay_on_the_same_tensors() -> None:
    recorder, seen = Recorder(), []

    def step(x: Tensor) -> Tensor:
        seen.append(x)
        return x.sum()

    again: list[int] = []
    captured = Captured(step, warm_up=2, again=lambda: again.append(1), record=recorder)
    given = [torch.full((3,), float(k)) for k in range(6)]
    results = [captured(x).clone() for x in given]
    assert [r.item() for r in results] == [3.0 * k for k in range(6)]
    assert (recorder.recorded, recorder.replayed, len(again)) == (1, 4, 3)
    assert seen[0] is given[0] and seen[2] is seen[5] and seen[2] is not given[2]
    assert captured(torch.ones(2)).item() == 2.0 and captured(torch.ones(3, dtype=torch.float64)).item() == 3.0
    assert recorder.replayed == 4  # other shapes and types run as they are


def test_elsewhere_than_on_cuda_a_warning_says_so() -> None:
    captured = Captured(lambda x: x + 1)
    with pytest.warns(UserWarning, match="on the cpu it runs as it is"):
        assert captured(torch.zeros(1)).item() == 1.0
    assert [captured(torch.full((1,), float(k))).item() for k in range(6)] == [k + 1.0 for k in range(6)]


class Deferred:
    """As with a CUDA graph, what Python counts counts while it records only; what tensors hold moves at each replay."""

    def __init__(self, run: Experiment) -> None:
        self.run = run

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        meter = self.run.meter
        samples = dict(meter.samples)
        work()  # moves the tensors too, so that the first replay must not
        after = dict(meter.samples)
        first = [True]

        def replay() -> None:
            if first.pop() if first else False:
                assert meter.samples == after != samples
                return
            kept, answered = dict(meter.samples), set(meter._answered)
            work()
            meter.samples = kept  # Python does not run in a replay
            meter._answered.clear()
            meter._answered.update(answered)

        return replay, None


def finished(run: Experiment) -> Experiment:
    loop.train(run, lambda _: None, lambda _: None)
    return run


@pytest.mark.parametrize("changes", [{}, {"optim": {"name": "adamw", "lr": 0.002}}, {"optim": {"per_block": True}}])
def test_a_captured_run_is_the_plain_run(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(**merge({"train": {"capture": True}}, changes))
    with pytest.warns(UserWarning, match="on the cpu it runs as it is"):
        plain = finished(build(config))
    run = build(config)
    monkeypatch.setattr(loop, "captured_step", functools.partial(loop.captured_step, record=Deferred(run)))
    finished(run)
    assert run.step == plain.step > 8  # of which 4 are not replayed, and the last one of each epoch is smaller
    for (name, a), b in zip(plain.evaluated.state_dict().items(), run.evaluated.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [row["train"] for row in plain.history] == [row["train"] for row in run.history]
    assert plain.meter.state_dict() == run.meter.state_dict()


def test_the_rate_on_the_device_is_the_rate() -> None:
    plain, run = build(settings()), build(settings(train={"capture": True}))
    assert isinstance(run.stepper.optimizers[0].param_groups[0]["lr"], Tensor)
    with pytest.warns(UserWarning, match="on the cpu"):
        finished(run)
    finished(plain)
    for a, b in zip(plain.network.parameters(), run.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # it is rounded to float32


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train": {"precision": "fp16"}}, "fp16"),
        ({"train": {"compile": True}}, "compiled"),
        ({"method": ["dgl", "pgl"]}, "other blocks from step to step"),
        ({"method": ["dgl", {"last_head_distillation": {"every": 10}}]}, "a context of its own for each step"),
    ],
)
def test_steps_that_differ_are_refused(changes: dict[str, Any], reason: str) -> None:
    merged = merge({"train": {"capture": True}}, changes)
    with pytest.raises(ConfigError, match=reason):
        build(settings(**merged))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_is_the_plain_run() -> None:
    plain = finished(build(settings(train={"device": "cuda"})))
    run = finished(build(settings(train={"device": "cuda", "capture": True})))
    for (name, a), b in zip(plain.evaluated.state_dict().items(), run.evaluated.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)
    assert plain.history[-1]["train"]["score"] == pytest.approx(run.history[-1]["train"]["score"], abs=0.05)
