"""The training loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from localgrad.batches import num_samples, rows
from localgrad.engine import local_losses
from localgrad.method import Term
from localgrad.models import freeze_batchnorm
from localgrad.network import exchange
from localgrad.randomness import keyed_randomness
from localgrad.spans import Span
from localgrad.train.capture import Captured, Record
from localgrad.train.experiment import Experiment, explained
from localgrad.train.meters import evaluate, merged
from localgrad.train.optim import learning_rate


def train(run: Experiment, after_step: Callable[[Experiment], None], after_epoch: Callable[[Experiment], None]) -> None:
    """Train ``run`` from where it stands to its last epoch.

    Args:
        after_step: called with everything consistent after each step; may save, show progress, or raise to stop.
        after_epoch: called after each epoch, its row already in ``run.history``.

    Raises:
        TrainingError: a loss is not finite.
    """
    config, network, meter = run.config, run.network, run.meter
    replica = 0 if network.replicas is None else network.replicas.rank
    one_step = functools.partial(step, run) if run.stepper.rate is None else captured_step(run)
    with keyed_randomness(config.train.seed, replica):
        while run.epoch < config.train.epochs:
            network.train()
            if config.model.batchnorm == "frozen":
                freeze_batchnorm(network.model)
            started = time.perf_counter()
            for inputs, targets in run.data.train.epoch(run.epoch, start=run.batch):
                run.stepper.set_learning_rate(rate_of(run, run.batch))
                one_step(*run.placed(inputs, targets))
                run.batch += 1
                run.step += 1
                meter.end_batch()
                if network.device.type == "cpu":
                    meter.check_finite(run.step)
                after_step(run)
            meter.check_finite(run.step)
            run.history.append(row(run, time.perf_counter() - started))
            run.epoch, run.batch = run.epoch + 1, 0
            meter.reset()
            after_epoch(run)


def rate_of(run: Experiment, batch: int) -> float:
    """The learning rate of one batch of the current epoch."""
    return learning_rate(run.config.optim, run.epoch, batch / len(run.data.train), run.config.train.epochs)


def step(run: Experiment, inputs: Tensor, targets: Any) -> None:
    """One optimizer step.

    Raises:
        TrainingError: it does not fit in memory, or the batch is too small for BatchNorm.
    """
    # Samples of this batch that each head has answered: micro-batches come in order.
    scored: dict[tuple[Span, int], int] = {}

    def observe(span: Span, term: Term | None, output: Any) -> None:
        start = scored.get((span, id(term)), 0)
        stop = scored[span, id(term)] = start + (num_samples(output) or 0)
        run.meter.add_output(span, term, output, rows(targets, start, stop))

    losses = local_losses(
        run.network,
        inputs,
        targets,
        run.step,
        autocast=run.autocast,
        on_output=observe,
        on_block_done=run.stepper.block_done,
    )
    with explained(inputs):
        for span, loss in losses:
            run.stepper.scaler.scale(loss).backward()
            run.meter.add_loss(span, loss)
    run.meter.add_up()
    run.stepper.finish(run.step)
    exchange(run.network)
    if run.average is not None:
        run.average.update_parameters(run.network)  # type: ignore[operator]


def captured_step(run: Experiment, record: Record | None = None) -> Callable[[Tensor, Any], None]:
    """`step` as CUDA graphs; ``record`` as in `localgrad.train.capture.Captured`."""
    captured = run.captured = Captured(
        run.network,
        lambda number, inputs, targets: step(run, inputs, targets),
        insist=run.config.train.capture is True,
        meter=run.meter,
        record=record,
    )
    return lambda inputs, targets: captured(run.step, inputs, targets)


def row(run: Experiment, seconds: float) -> dict[str, Any]:
    """What an epoch leaves in the history; updates ``run.best`` by the validation split."""
    result: dict[str, Any] = {
        "epoch": run.epoch + 1,
        "step": run.step,
        "lr": rate_of(run, run.batch - 1),
        "seconds": seconds,
        "train": merged(run.network, run.meter).read(),
    }
    if run.network.replicas is not None:
        run.network.replicas.average_buffers()
    if run.data.validation is not None:
        result["validation"] = evaluate(run.evaluated, run.data.validation, run.autocast)
        score = result["validation"]["score"]["model"]
        if run.best is None or score > run.best["score"]:
            run.best = {"epoch": run.epoch + 1, "step": run.step, "score": score}
    return result
