"""A captured run is the plain run: bit-equal weights, averages and counters, whatever the method and the last batch.

On a CPU a tape stands for CUDA graphs. With LOCALGRAD_DEVICE=cuda they are real, and kernels add in any order.
"""

from __future__ import annotations

import functools
import os
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

DEVICE = torch.device(os.environ.get("LOCALGRAD_DEVICE") or "cpu")
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
    network = build(model, method, 4, dropout=dropout).to(DEVICE)
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
                (step or functools.partial(loop.step, run))(*(t.to(DEVICE) for t in batch(size, seed=run.step)))
                run.step += 1
                run.meter.end_batch()
            read.append(run.meter.state_dict())
            run.meter.reset()
    return read


def assert_captured(monkeypatch: pytest.MonkeyPatch, make: Any) -> Captured:
    on_cuda = DEVICE.type == "cuda"
    warm_up = 2 if on_cuda else 1  # the first step there reads the values of targets
    monkeypatch.setattr(loop, "Captured", functools.partial(Captured, warm_up=warm_up))
    plain, run = make(), make()
    expected = trained(plain, 1 + 2 * warm_up)
    found = trained(run, 1 + 2 * warm_up, loop.captured_step(run, None if on_cuda else Tape(monkeypatch)))
    for ours, theirs in ((run.network, plain.network), (run.average, plain.average)):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            if on_cuda:
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)
            else:
                assert torch.equal(a, b), name
    for kind in ("samples", "batches", *(() if on_cuda else ("losses", "scores"))):
        assert [epoch[kind] for epoch in found] == [epoch[kind] for epoch in expected]
    assert run.captured is not None and run.captured.reason == "", run.captured.reason
    return run.captured


@pytest.mark.parametrize("name", ALL)
def test_a_captured_run_is_the_plain_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = 0.0 if name in AGAIN else 0.2
    captured = assert_captured(monkeypatch, lambda: experiment(ALL[name], OptimConfig(), dropout=dropout))
    kinds = len(captured.kinds)
    assert kinds >= (3 if name in KINDS else 2)
    assert captured.replayed == captured.steps - captured.warm_up * kinds >= 5
