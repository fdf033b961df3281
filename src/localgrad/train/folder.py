"""The one directory a run writes to: configuration, checkpoints, metrics, pictures, weights."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from localgrad.config import Config, dump
from localgrad.errors import CheckpointError, ConfigError
from localgrad.train import checkpoint
from localgrad.train.experiment import Experiment

CHECKPOINT, BEST, WEIGHTS = "checkpoint.safetensors", "best.safetensors", "model.safetensors"


def write_text(path: Path, text: str) -> None:
    """Write a file wholly or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another --run-dir or free some space") from error


class RunFolder:
    """Files of one run.

    Args:
        path: created if missing.
        resume: continue the run found there; otherwise a folder that holds a run is refused unless ``overwrite``.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        self.resume = resume
        holds_run = self.checkpoint.exists() or checkpoint.previous(self.checkpoint).exists()
        if holds_run and not (resume or overwrite):
            raise ConfigError(
                f"{path} already holds a run; continue it with --resume {path}, replace it with --overwrite, or choose "
                "another --run-dir"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            if overwrite and not resume:
                for name in (CHECKPOINT, BEST, WEIGHTS, CHECKPOINT + ".previous", BEST + ".previous", "metrics.csv"):
                    (path / name).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use {path} as run directory: {error.strerror}; choose another --run-dir") from error
        self._board: Any = None

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint; the one before it lies beside as ``.previous``."""
        return self.path / CHECKPOINT

    def start(self, run: Experiment) -> str | None:
        """Write the configuration and, when resuming, restore the run; returns a remark to show, if any."""
        if self.resume:
            remark = self._restore(run)
        else:
            write_text(self.path / "config.yaml", dump(run.config))
            remark = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return remark or "tensorboard is not installed, metrics go to metrics.csv only: pip install localgrad[tracking]"
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=run.epoch + 1)
        return remark

    def _restore(self, run: Experiment) -> str | None:
        state, path, reason = checkpoint.load_latest(self.checkpoint)
        run.restore(state, path)
        return None if reason is None else f"{reason} Continuing from {path.name}."

    def save(self, run: Experiment) -> None:
        """Write a checkpoint."""
        checkpoint.save(self.checkpoint, run.state())

    def finish_epoch(self, run: Experiment) -> None:
        """Write metrics and checkpoints of a finished epoch."""
        row = run.history[-1]
        if run.best is not None and run.best["epoch"] == row["epoch"]:
            checkpoint.save(self.path / BEST, {"epoch": row["epoch"], "model": run.evaluated.state_dict()})
        self.save(run)
        write_text(self.path / "metrics.csv", metrics_csv(run.history))
        if self._board is not None:
            for name, value in flat(row).items():
                if name not in ("epoch", "step"):
                    self._board.add_scalar(name, value, row["epoch"])
            self._board.flush()

    def best_weights(self) -> dict[str, Any]:
        """The state of the network at the best epoch."""
        state, _, _ = checkpoint.load_latest(self.path / BEST)
        return dict(state["model"])

    def finish(self, run: Experiment, result: dict[str, Any]) -> None:
        """Write the result, and the plain weights of the model: its own keys, readable without localgrad."""
        from safetensors.torch import save_file

        weights = {k: v.detach().cpu().contiguous().clone() for k, v in run.evaluated.model.state_dict().items()}
        save_file(weights, str(self.path / WEIGHTS))
        write_text(self.path / "result.json", json.dumps(result, indent=2) + "\n")
        if self._board is not None:
            self._board.close()


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


def read_config(path: Path) -> Config:
    """The configuration a run directory was started with.

    Raises:
        CheckpointError: no run there.
    """
    import yaml

    from localgrad.config import validate

    file = path / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{path} holds no run (no config.yaml); --resume takes a directory that `localgrad train` wrote")
    try:
        settings = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} is damaged: expected settings, found {type(settings).__name__}")
    return validate(settings, str(file))
