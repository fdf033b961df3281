"""One run from start to result, and several side by side."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from localgrad.config import Config, dump, folder_name, run_names
from localgrad.data.loaders import Files
from localgrad.errors import CheckpointError, ConfigError, LocalgradError
from localgrad.measure.plots import comparison_picture, curves_picture
from localgrad.spec import method_name
from localgrad.train.experiment import Experiment, build, with_method
from localgrad.train.folder import RunFolder
from localgrad.train.loop import train
from localgrad.train.meters import evaluate
from localgrad.train.progress import Progress
from localgrad.train.trace import tracing


class Interrupted(LocalgradError):
    """The run was stopped from outside and saved."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a question to ask between steps; a second one stops at once.

    A process that was started by ``nohup`` goes on ignoring SIGHUP.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(*_: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    old = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked.is_set
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run(
    config: Config, folder: RunFolder, console: Console, title: str, resume_with: str
) -> tuple[Experiment, dict[str, Any]]:
    """Train one method and write its directory.

    Args:
        config: of this method.
        folder: claimed.
        console: for progress.
        title: what to call it.
        resume_with: the command that continues the run, for the message after an interruption.

    Returns:
        the experiment and its result: scores on the test split of every head at the last epoch, and of the model at
        the best epoch of the validation split, kept apart; ``split`` is what the former is called where it lies.

    Raises:
        Interrupted: Ctrl-C, SIGTERM, SIGHUP, or nobody reads the progress any more; after a checkpoint was written.
    """
    experiment = build(config)
    wire = folder.begun().get("wire", "same") if folder.continues else "same"
    if wire != "same":
        raise ConfigError(
            f"{folder.path} was begun with wire={wire}, which rounds features between ranks; continue it with torchrun "
            "and --parallel block=2"
        )
    folder.begin(dump(config))
    remark = folder.open(experiment)
    if remark:
        console.print(remark, style="dim", soft_wrap=True)
    if isinstance(experiment.data.train, Files):
        console.print(f"{experiment.data.title}: {experiment.data.train.how}", style="dim", soft_wrap=True)
    every = config.train.checkpoint_every
    traced = tracing(config, folder.path, experiment)
    with Progress(console, title) as progress, stop_requests() as stop_requested, traced as next_step:

        def after_step(state: Experiment) -> None:
            next_step()
            progress.step(state)
            stopping = stop_requested() or progress.unread
            if stopping or (every is not None and state.step % every == 0):
                folder.save(state)
            if stopping:
                raise Interrupted(f"stopped at step {state.step} and saved; continue with: {resume_with}")

        def after_epoch(state: Experiment) -> None:
            folder.finish_epoch(state)
            progress.epoch(state)
            if stop_requested() or progress.unread:
                raise Interrupted(f"stopped after epoch {state.epoch} and saved; continue with: {resume_with}")

        train(experiment, after_step, after_epoch)
    result = result_of(experiment, folder)
    folder.finish(experiment, result)
    curves_picture(experiment.history, title, folder.path / "curves.png")
    return experiment, result


def result_of(run: Experiment, folder: RunFolder) -> dict[str, Any]:
    """What a run that has ended shows: scores at the last epoch and, if one is known, at the best one."""
    network = run.evaluated
    last = evaluate(network, run.data.test, run.autocast)
    trained_on = {
        "kind": run.data.kind,
        "classes": list(run.data.classes),
        "input_shape": list(run.data.input_shape),
        "mean": list(run.data.mean),
        "std": list(run.data.std),
    }
    result: dict[str, Any] = {
        "method": method_name(run.config.method),
        "model": run.config.model.name,
        "data": run.data.title,
        "trained_on": trained_on,
        "blocks": run.network.num_blocks,
        "cuts": [cut.name for cut in run.network.cuts],
        "epochs": run.epoch,
        "steps": run.step,
        "seed": run.config.train.seed,
        "split": run.data.scored,
        "steps_as": run.steps_as,
        "last": {"epoch": run.epoch, "score": last["score"], "metrics": last["metrics"]},
    }
    if run.best is not None:
        weights = {k: v.clone() for k, v in network.state_dict().items()}
        network.load_state_dict(folder.best_weights(run))
        result["best"] = {
            "epoch": run.best["epoch"],
            "validation": run.best["score"],
            "score": evaluate(network, run.data.test, run.autocast)["score"],
        }
        network.load_state_dict(weights)
    return result


def compare(
    config: Config, path: Path, console: Console, *, resume: bool, overwrite: bool, resume_with: str
) -> list[dict[str, Any]]:
    """Train ``config.method`` and every method in ``config.beside`` with the same settings, data order and weights.

    Writes one directory for each below ``path``, ``comparison.png`` and the costs of a training step, measured in one
    process with the contestants in turn.

    Returns:
        the result of each with its ``cost``, the first being the configured method.
    """
    specs, names = [config.method, *config.beside], run_names(config)
    experiments, results, refused = [], [], []
    for name, spec in zip(names, specs, strict=True):
        folder = RunFolder(path / folder_name(name) if config.beside else path)
        # A comparison may have been stopped before it came to this method.
        folder.claim(resume=resume and (not config.beside or folder.holds_run), overwrite=overwrite)
        with contextlib.closing(folder):
            try:
                experiment, result = run(with_method(config, spec), folder, console, name, resume_with)
            except CheckpointError as error:
                if not config.beside:
                    raise
                refused.append(f"{name}: {error}")  # the other runs have nothing to do with it
                continue
        experiments.append(experiment)
        results.append(result)
    if refused:
        raise CheckpointError(f"{' '.join(refused)} The other runs have ended; {resume_with} shows them all")
    console.print("Measuring a step's memory and time, the methods in turn.", style="dim")
    measure_costs(results, experiments)
    for result, name in zip(results, names, strict=True):
        result["method"] = name
    if len(results) > 1:
        comparison_picture(results, path / "comparison.png")
    return results


def measure_costs(results: list[dict[str, Any]], experiments: list[Experiment]) -> None:
    """Add what a training step costs to each result; the contestants are timed in turn."""
    from localgrad.costs import cost, step_seconds  # counting FLOPs imports triton, which training does not need

    first = experiments[0]
    inputs, targets = first.placed(*next(iter(first.data.train.epoch(0))))
    networks = [experiment.network for experiment in experiments]
    compiled = first.config.train.compile
    seconds = step_seconds(networks, inputs, targets, first.autocast, compiled=compiled)
    for index, (result, network) in enumerate(zip(results, networks, strict=True)):
        result["cost"] = asdict(cost(network, inputs, targets, first.autocast)) | {
            "step_seconds": seconds[index - len(networks)],
            "batch_size": len(inputs),
        }
        if compiled:
            result["cost"]["plain_step_seconds"] = seconds[index]
