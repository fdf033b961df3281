"""The one directory a run writes to: configuration, checkpoints, metrics, pictures, weights."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from localgrad.config import dump
from localgrad.errors import CheckpointError, ConfigError
from localgrad.train import checkpoint
from localgrad.train.experiment import Experiment
from localgrad.train.finished import WEIGHTS

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
STATES = (CHECKPOINT, CHECKPOINT + ".previous", BEST, BEST + ".previous")
WRITTEN = (
    *STATES,
    WEIGHTS,
    "config.yaml",
    "metrics.csv",
    "curves.png",
    "result.json",
    "results.json",
    "comparison.png",
)


def write(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, wholly or not at all.

    Raises:
        ConfigError: it cannot be written; what was there before is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; choose another --run-dir or free some space"
        ) from error


class RunFolder:
    """Files of one run.

    Args:
        path: created if missing.
        resume: continue the run found there; otherwise a folder that holds a run is refused unless ``overwrite``.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        self.resume = resume
        if self.holds_run and not (resume or overwrite):
            raise ConfigError(
                f"{path} already holds a run; continue it with --resume {path}, replace it with --overwrite, or choose "
                "another --run-dir"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            if overwrite and not resume:
                for name in WRITTEN:
                    (path / name).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot use {path} as run directory: {error.strerror}; choose another --run-dir"
            ) from error
        self._board: Any = None

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint; the one before it lies beside as ``.previous``."""
        return self.path / CHECKPOINT

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return any((self.path / name).exists() for name in ("config.yaml", *STATES))

    def start(self, run: Experiment) -> str | None:
        """Write the configuration and, when resuming, restore the run; returns a remark to show, if any."""
        remark = None
        if not self.resume:
            write(self.path / "config.yaml", dump(run.config))
        elif any((self.path / name).exists() for name in STATES):
            remark = self.restore(run)
        else:
            remark = f"{self.path} holds no checkpoint yet: starting from the beginning."
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return (
                remark
                or "tensorboard is not installed, metrics go to metrics.csv only: pip install localgrad[tracking]"
            )
        try:
            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=run.epoch + 1)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path / 'tensorboard'}: {error.strerror}") from error
        return remark

    def close(self) -> None:
        """Close what is open; nothing unsaved is saved."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def restore(self, run: Experiment) -> str | None:
        """Continue ``run`` from the newest checkpoint that is whole; returns a remark if that is not the newest."""
        state, path, reason = checkpoint.load_latest(self.checkpoint)
        run.restore(state, path)
        return None if reason is None else f"{reason} Continuing from {path.name}."

    def save(self, run: Experiment) -> None:
        """Write a checkpoint, unless the run is spoilt: a loss that was not finite raises `TrainingError`."""
        run.meter.check_finite(run.step)
        checkpoint.save(self.checkpoint, run.state())

    def finish_epoch(self, run: Experiment) -> None:
        """Write metrics and checkpoints of a finished epoch."""
        row = run.history[-1]
        if run.best is not None and run.best["epoch"] == row["epoch"]:
            checkpoint.save(self.path / BEST, {"epoch": row["epoch"], "model": run.evaluated.state_dict()})
        self.save(run)
        write(self.path / "metrics.csv", metrics_csv(run.history))
        if self._board is not None:
            for name, value in flat(row).items():
                if name not in ("epoch", "step"):
                    self._board.add_scalar(name, value, row["epoch"])
            self._board.flush()

    def best_weights(self, epoch: int) -> dict[str, Any]:
        """The state of the network at the best epoch.

        Raises:
            CheckpointError: the file is missing, damaged, or of another epoch.
        """
        reasons = []
        for path in (self.path / BEST, checkpoint.previous(self.path / BEST)):
            try:
                state = checkpoint.load(path)
                if state["epoch"] == epoch:
                    return dict(state["model"])
                reasons.append(f"{path} is of epoch {state['epoch']}.")
            except CheckpointError as error:
                reasons.append(str(error))
            except (KeyError, TypeError):
                reasons.append(f"{path} holds something else.")
        raise CheckpointError(f"the weights of the best epoch, {epoch}, are lost: {' '.join(reasons)}")

    def finish(self, run: Experiment, result: dict[str, Any]) -> None:
        """Write the result, and the plain weights of the model: its own keys, readable without localgrad."""
        from safetensors.torch import save

        weights = {k: v.detach().cpu().contiguous().clone() for k, v in run.evaluated.model.state_dict().items()}
        write(self.path / WEIGHTS, save(weights))
        write(self.path / "result.json", json.dumps(result, indent=2) + "\n")


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """``{"train": {"loss": {"block 1": 2.3}}}`` -> ``{"train/loss/block 1": 2.3}``."""
    result: dict[str, float] = {}
    for name, value in row.items():
        result |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return result


def metrics_csv(history: list[dict[str, Any]]) -> str:
    """One line for each epoch, one column for each head's loss and score on each split."""
    rows = [flat(row) for row in history]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
