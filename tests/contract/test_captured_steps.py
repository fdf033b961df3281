"""A captured run is the plain run: bit-equal weights, averages and counters, whatever the method and the last batch."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

import localgrad
from localgrad import methods
from localgrad.config import OptimConfig, validate
from localgrad.method import Method
from localgrad.train import loop
from localgrad.train.capture import Captured
from localgrad.train.experiment import Average, Experiment
from localgrad.train.meters import Meter
from localgrad.train.optim import Stepper
from tape import Tape
from zoo import METHODS, TASK, batch, build

DGL = methods.dgl(TASK)
# Those whose steps are of several kinds, at shorter periods, so that each kind is replayed.
KINDS = {
    "every=2": replace(DGL, terms=(*DGL.terms, replace(DGL.terms[0], weight=0.5, every=2))),
    "pgl(every=3)": methods.pgl(DGL, every=3),
    "last_head_distillation(every=3)": methods.last_head_distillation(DGL, every=3),
}
ALL: dict[str, Method] = METHODS | KINDS | {"accumulation(dgl)": methods.accumulation(DGL, parts=2)}
# Parts that run again in the backward pass repeat their draws, which no graph does; without dropout they have none.
AGAIN = [name for name, method in ALL.items() if method.recompute.blocks or method.recompute.auxiliary]


def experiment(method: Method, optim: OptimConfig, model: str = "residual", dropout: float = 0.2) -> Experiment:
    config = validate({"method": ["dgl"], "train": {"capture": True}}, "test")
    network = build(model, method, 4, dropout=dropout)
    stepper = Stepper(network, optim, torch.amp.GradScaler("cpu", enabled=False), capture=True)
    nothing: Any = None
    return Experiment(config, nothing, network, stepper, Average(network, 0.9), Meter(network))


def trained(run: Experiment, epochs: int, step: Any = None) -> list[dict[str, Any]]:
    """Epochs of two batches of 8 and one of 5; what the meter read after each."""
    read = []
    with localgrad.keyed_randomness(0):
        for _ in range(epochs):
            for size in (8, 8, 5):
                run.stepper.set_learning_rate(0.1 / (1 + run.step))
                (step or functools.partial(loop.step, run))(*batch(size, seed=run.step))
                run.step += 1
                run.meter.end_batch()
            read.append(run.meter.state_dict())
            run.meter.reset()
    return read


def assert_captured(monkeypatch: pytest.MonkeyPatch, make: Any, epochs: int = 3) -> Captured:
    monkeypatch.setattr(loop, "Captured", functools.partial(Captured, warm_up=1))
    plain, run = make(), make()
    expected = trained(plain, epochs)
    found = trained(run, epochs, loop.captured_step(run, Tape(monkeypatch)))
    for ours, theirs in ((run.network, plain.network), (run.average, plain.average)):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert found == expected
    assert run.captured is not None and run.captured.reason == "", run.captured.reason
    return run.captured


@pytest.mark.parametrize("name", ALL)
def test_a_captured_run_is_the_plain_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = 0.0 if name in AGAIN else 0.2
    captured = assert_captured(monkeypatch, lambda: experiment(ALL[name], OptimConfig(), dropout=dropout))
    kinds = len(captured.kinds)
    assert kinds >= (3 if name in KINDS else 2)
    assert captured.replayed == captured.steps - kinds >= 5
