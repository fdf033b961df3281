"""Who is told of a run: files and experiment trackers, named by ``train.loggers``.

| name | written where | a run that goes on |
|---|---|---|
| ``csv`` | ``metrics.csv`` of the run directory | is written again |
| ``tensorboard`` | ``tensorboard/`` of the run directory | covers what was there |
| ``wandb`` | ``wandb/`` of the run directory; online as ``WANDB_PROJECT`` says | is the same run |
| ``mlflow`` | as ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` say | is the same run |
| ``trackio`` | as ``TRACKIO_DIR`` says, project ``localgrad`` | is the same run |
| ``module:Class`` | a `Logger` of the user's | as it does |
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from localgrad import sealed
from localgrad.errors import ConfigError, LocalgradError, TrainingError, nearest
from localgrad.named import function, is_named

PROJECT = "localgrad"


class Logger(Protocol):
    """Told of one run by the process that writes its directory.

    Made as ``Logger(folder, key, settings)``.

    Args:
        folder: the run directory.
        key: twelve letters and digits that are the run's own, and stay when it goes on.
        settings: of the run, by their full name.
    """

    def __init__(self, folder: Path, key: str, settings: dict[str, Any]) -> None: ...

    def log(self, history: Sequence[dict[str, float]]) -> None:
        """Called as a run begins or goes on, and after each epoch.

        Args:
            history: one row for each epoch so far, from the first one on: values by names like ``train/loss/block 1``;
                ``epoch`` counts from 1.
        """

    def close(self) -> None:
        """The run has ended or stopped; it may go on under the same key."""


class CSV:
    """One line for each epoch, one column for each head's loss and score on each split."""

    def __init__(self, folder: Path, key: str, settings: dict[str, Any]) -> None:
        self.path = folder / "metrics.csv"

    def log(self, history: Sequence[dict[str, float]]) -> None:
        if not history:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in history for name in row)))
        writer.writeheader()
        writer.writerows(history)
        sealed.write(self.path, text.getvalue())

    def close(self) -> None:
        pass


class Tracker:
    """Adds each epoch once: ``told`` of them are there already."""

    told = 0

    def log(self, history: Sequence[dict[str, float]]) -> None:
        for row in history[self.told :]:
            figures = {name: value for name, value in row.items() if name not in ("epoch", "step")}
            self.add(figures, int(row["epoch"]))
        self.told = max(self.told, len(history))

    def add(self, row: dict[str, float], epoch: int) -> None:
        raise NotImplementedError


class TensorBoard(Tracker):
    """Scalars of ``torch.utils.tensorboard``."""

    def __init__(self, folder: Path, key: str, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=1)

    def add(self, row: dict[str, float], epoch: int) -> None:
        for name, value in row.items():
            self.board.add_scalar(name, value, epoch)
        self.board.flush()

    def close(self) -> None:
        self.board.close()


class WandB(Tracker):
    """A run of Weights & Biases with the key as its id."""

    def __init__(self, folder: Path, key: str, settings: dict[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.run = wandb.init(
            project=project, name=folder.name, id=key, resume="allow", dir=str(folder), config=settings
        )
        self.told = max(0, self.run.step - 1)  # offline nothing is known of before: the newest file has all epochs

    def add(self, row: dict[str, float], epoch: int) -> None:
        self.run.log(row, step=epoch)

    def close(self) -> None:
        self.run.finish()


class MLflow(Tracker):
    """A run of MLflow, found by a tag."""

    def __init__(self, folder: Path, key: str, settings: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(name)
        experiment = self.client.create_experiment(name) if known is None else known.experiment_id
        runs = self.client.search_runs([experiment], f"tags.{PROJECT} = '{key}'")
        if runs:
            self.id = runs[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            self.told = len(self.client.get_metric_history(self.id, "lr"))
        else:
            self.id = self.client.create_run(experiment, run_name=folder.name, tags={PROJECT: key}).info.run_id
            for setting, value in settings.items():
                self.client.log_param(self.id, setting, value)

    def add(self, row: dict[str, float], epoch: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, epoch) for name, value in row.items()])

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackio(Tracker):
    """A run of trackio, found by its name, which ends with the key."""

    def __init__(self, folder: Path, key: str, settings: dict[str, Any]) -> None:
        import trackio

        self.run = trackio.init(PROJECT, f"{folder.name}-{key}", resume="allow", config=settings, embed=False)
        self.told = max(0, self.run._next_step - 1)

    def add(self, row: dict[str, float], epoch: int) -> None:
        self.run.log(row, step=epoch)

    def close(self) -> None:
        import trackio

        trackio.finish()  # type: ignore[no-untyped-call]


LOGGERS: dict[str, type[Logger]] = {
    "csv": CSV,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def known(names: Sequence[str]) -> None:
    """Refuse names of loggers that cannot be made here.

    Raises:
        ConfigError: an unknown name, or one whose package is not installed.
    """
    for name in names:
        if is_named(name):
            function(name, "logger")
        elif name not in LOGGERS:
            raise ConfigError(f"train.loggers: {nearest(name, LOGGERS, 'logger')}; or write module:Class")
        elif name != "csv" and getattr(importlib.util.find_spec(name), "origin", None) is None:  # a folder has none
            raise ConfigError(f"train.loggers={name}: {name} is not installed; pip install 'localgrad[{name}]'")


class Loggers:
    """Several, as one.

    Args:
        names: of them.
        folder, key, settings: as `Logger` takes them.

    Raises:
        ConfigError: one cannot begin.
    """

    def __init__(self, names: Sequence[str], folder: Path, key: str, settings: dict[str, Any]) -> None:
        self.loggers: dict[str, Logger] = {}
        for name in names:
            make = function(name, "logger") if is_named(name) else LOGGERS[name]
            with _explained(name, ConfigError, "cannot begin"):
                self.loggers[name] = make(folder, key, flat(settings, "."))

    def log(self, history: Sequence[dict[str, Any]]) -> None:
        """Tell each of all epochs so far.

        Raises:
            TrainingError: one fails.
        """
        rows = [flat(row) for row in history]
        for name, logger in self.loggers.items():
            with _explained(name, TrainingError, "failed after the checkpoint was written"):
                logger.log(rows)

    def close(self) -> None:
        """Close each; what it was told is there already."""
        for logger in self.loggers.values():
            with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
                logger.close()
        self.loggers = {}


@contextlib.contextmanager
def _explained(name: str, kind: type[LocalgradError], what: str) -> Iterator[None]:
    """What trackers print is no output of ours, and what they raise is one sentence."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except LocalgradError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise kind(
            f"logger {name} {what}: {type(error).__name__}: {said}; go on without it in train.loggers"
        ) from error


def flat(row: dict[str, Any], separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """``{"train": {"loss": {"block 1": 2.3}}}`` -> ``{"train/loss/block 1": 2.3}``."""
    result: dict[str, Any] = {}
    for name, value in row.items():
        inner = isinstance(value, dict)
        result |= flat(value, separator, f"{prefix}{name}{separator}") if inner else {prefix + name: value}
    return result
