"""The one directory a run writes to, whatever number of processes train it.

    config.yaml   run.json        the settings; its key, the job that began it, and how its features travel
    checkpoints/                  all a run needs to go on, its settings included (`localgrad.distributed.Checkpoints`)
    metrics.csv, ...              what the newest checkpoint knows, for people (`localgrad.train.loggers`)
    profile/                      traces of the steps that train.profile names
    model.safetensors result.json what is left in the end

What a later command reads is sealed (`localgrad.sealed`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from localgrad import sealed
from localgrad.distributed.checkpoint import Checkpoints
from localgrad.errors import CheckpointError, ConfigError
from localgrad.train.experiment import Experiment
from localgrad.train.finished import CONFIG, RESULT, WEIGHTS
from localgrad.train.loggers import Loggers

CHECKPOINTS, RUN, LOCK, HOLDER = "checkpoints", "run.json", ".lock", ".lock.holder"
PROFILE = "profile"
WRITTEN = (
    CHECKPOINTS,
    PROFILE,
    CONFIG,
    RUN,
    WEIGHTS,
    RESULT,
    "metrics.csv",
    "tensorboard",
    "wandb",
    "curves.png",
    "results.json",
    "comparison.png",
)


class RunFolder:
    """Files of one run.

    Args:
        path: need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.continues = False
        self.first = True  # of the processes that train the run: the one that writes what people read
        self.checkpoints: Checkpoints | None = None
        self._lock = FileLock(path / LOCK)
        self._begun = False  # by this process, whose settings lie there
        self.key = uuid.uuid4().hex[:12]  # by which trackers know the run
        self._loggers: Loggers | None = None

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return any((self.path / name).exists() for name in (CONFIG, RUN)) or any(self.path.glob(f"{CHECKPOINTS}/step*"))

    def claim(self, *, resume: bool = False, overwrite: bool = False, job: str | None = None) -> None:
        """Take the directory until `close`, for a new run or the one found there.

        Args:
            resume: continue what is found; otherwise a directory that holds a run is refused unless ``overwrite``,
                which clears it.
            job: of torchrun. A run that this very job began continues, see `begin`.

        Raises:
            ConfigError: another process has it, it holds a run, its name is no UTF-8, or it cannot be written.
        """
        try:
            os.fsencode(self.path).decode()
        except UnicodeDecodeError:
            raise ConfigError(
                f"the name of the run directory {str(self.path)!r} is no UTF-8, which trackers need; choose another"
            ) from None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            (self.path / HOLDER).write_text(json.dumps(holder))
        except Timeout:
            raise ConfigError(
                f"{self.path} is in use by {self._holder()}; wait for it, or choose another one"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"cannot use {self.path} as run directory: {error.strerror}; choose another --run-dir"
            ) from error
        try:
            self.continues = resume or (job is not None and self.begun().get("job") == job)
            if self.continues or not self.holds_run:
                return
            if not overwrite:
                raise ConfigError(
                    f"{self.path} already holds a run; continue it with --resume {self.path}, replace it with "
                    "--overwrite, or choose another --run-dir"
                )
            self._clear()
        except BaseException:
            self.close()
            raise

    def _holder(self) -> str:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            holder = json.loads((self.path / HOLDER).read_text())
            return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
        return "another process"

    def _clear(self) -> None:
        """Remove the run found here, and those of other methods below it."""
        below = [path for path in self.path.iterdir() if path.is_dir() and RunFolder(path).holds_run]
        try:
            for path in (*(self.path / name for name in WRITTEN), *below):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot replace the run in {self.path}: {error}; choose another --run-dir") from error

    def begun(self) -> dict[str, Any]:
        """What `begin` wrote: the job, and ``wire``; nothing if that is missing or damaged."""
        with contextlib.suppress(CheckpointError):
            return sealed.read_json(self.path / RUN)
        return {}

    def begin(self, settings: str, job: str | None = None, wire: str = "same") -> None:
        """Write what identifies the run: before its first step, and again when another job continues it."""
        sealed.write(self.path / CONFIG, sealed.yaml_text(settings))
        self.key = self.begun().get("key", self.key)
        sealed.write(self.path / RUN, sealed.json_text({"job": job, "wire": wire, "key": self.key}))
        self._begun = True

    def open(self, run: Experiment, timeout: timedelta | None = None) -> str | None:
        """Prepare to save and, where the run continues, restore it; returns a remark to show, if any.

        Every process that trains the run calls it.
        """
        self._open_checkpoints(run, timeout)
        remark = None
        if self.continues and not self.restore(run):
            remark = f"{self.path} holds no checkpoint yet: starting from the beginning."
        if not self.first:
            return None
        self._loggers = Loggers(run.config.train.loggers, self.path, self.key, dataclasses.asdict(run.config))
        self._loggers.log(run.history)  # a kill may have cut them off
        return remark

    def close(self) -> None:
        """Close what is open and let go of the directory; nothing unsaved is saved."""
        if self._loggers is not None:
            self._loggers.close()
            self._loggers = None
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                (self.path / HOLDER).unlink()
            self._lock.release()

    def _open_checkpoints(self, run: Experiment, timeout: timedelta | None = None) -> Checkpoints:
        if self.checkpoints is None:
            optimizers = run.stepper.optimizers
            self.checkpoints = Checkpoints(self.path / CHECKPOINTS, run.network, optimizers, timeout=timeout)
        return self.checkpoints

    def restore(self, run: Experiment) -> bool:
        """Continue ``run`` from the newest checkpoint that is whole; whether there was one.

        Raises:
            CheckpointError: all are damaged, or they are of a run with other settings.
        """
        checkpoints = self._open_checkpoints(run)
        step = checkpoints.newest()
        if step is None:
            return False
        run.restore(checkpoints.beside(step), checkpoints.folder, lambda: checkpoints.load(step))
        return True

    def save(self, run: Experiment) -> None:
        """Write a checkpoint, unless the run is spoilt: a loss that was not finite raises `TrainingError`.

        Raises:
            CheckpointError: the directory is gone; it is not made anew, as settings and lock went with it.
        """
        assert self.checkpoints is not None
        if self._begun and not (self.path / CONFIG).is_file():
            raise CheckpointError(
                f"the run directory {self.path}/ is gone, or its {CONFIG}: nothing can be saved there"
            )
        run.meter.check_finite(run.step)
        replicas = run.network.replicas
        if replicas is not None:
            replicas.check_equal()
            replicas.average_buffers()
        needs = () if run.best is None else (run.best["step"],)
        self.checkpoints.save(run.step, beside=run.state(), needs=needs)

    def finish_epoch(self, run: Experiment) -> None:
        """Write the checkpoint of a finished epoch, then tell the loggers."""
        self.save(run)
        if self._loggers is not None:
            self._loggers.log(run.history)

    def best_weights(self, run: Experiment) -> dict[str, Tensor]:
        """The state of what is evaluated, as it was at the best epoch.

        Raises:
            CheckpointError: that checkpoint is missing or damaged.
        """
        assert run.best is not None
        checkpoints, step = self._open_checkpoints(run), run.best["step"]
        try:
            return weights_at(checkpoints, step, averaged=run.average is not None)
        except CheckpointError as error:
            raise CheckpointError(f"the weights of the best epoch, {run.best['epoch']}, are lost: {error}") from error

    def finish(self, run: Experiment, result: dict[str, Any]) -> None:
        """Write the result, and the plain weights of the model: its own keys, readable without localgrad."""
        sealed.write(self.path / WEIGHTS, sealed.tensors_data(run.evaluated.model.state_dict()))
        sealed.write(self.path / RESULT, sealed.json_text(result))


def weights_at(checkpoints: Checkpoints, step: int, averaged: bool) -> dict[str, Tensor]:
    """The state of what is evaluated, after so many steps: of the network, or of its moving average.

    Raises:
        CheckpointError: that checkpoint is missing or damaged.
    """
    if not averaged:
        return checkpoints.weights(step)
    average = checkpoints.beside(step)["average"]
    return {name.removeprefix("module."): value for name, value in average.items() if name.startswith("module.")}
