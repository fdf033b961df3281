"""A run that is killed at any moment, through the command line, ends with the weights of one that never was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = 10
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# 80 steps: enough for eight kills of which each comes within a few steps, and soon done.
TRAIN = [
    "train", "digits", "beside=[]", "--epochs", "5", "train.threads=1", "data.limit=280", "train.batch_size=16",
    "train.checkpoint_every=2", "train.ema_decay=0.9",
]  # fmt: skip


def localgrad(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "localgrad", *arguments],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(*arguments: str) -> str:
    process = localgrad(*arguments)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


def changes(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino


def wait_for_change(path: Path, process: subprocess.Popen[str]) -> bool:
    """Whether ``path`` was replaced before the process ended."""
    before = changes(path)
    while process.poll() is None:
        if changes(path) != before:
            return True
        time.sleep(0.002)
    return False


def steps_saved(folder: Path) -> int:
    found = (folder / "checkpoints").glob("step????????/complete.json")
    return max((int(path.parent.name.removeprefix("step")) for path in found), default=0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finish(*TRAIN, "--run-dir", str(folder))
    return (folder / "model.safetensors").read_bytes()


def test_killed_ten_times_and_resumed(uninterrupted: bytes, tmp_path: Path) -> None:
    folder, draws = tmp_path / "run", random.Random(0)
    newest, seen = folder / "checkpoints", []
    for kill in range(KILLS):
        begun = (folder / "config.yaml").is_file()
        process = localgrad("train", "--resume", str(folder)) if begun else localgrad(*TRAIN, "--run-dir", str(folder))
        if kill in (0, 4):  # while it starts: imports, data, restoring
            time.sleep(draws.uniform(0.2, 1.5))
        else:  # after some checkpoint of this process, and up to a few steps later: also in the middle of saving
            for _ in range(draws.randint(1, 2)):
                wait_for_change(newest, process)
            time.sleep(draws.uniform(0.0, 0.05))
        process.kill()
        out, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, (
            f"kill {kill} came too late, or it failed: {out[-500:]} {err[-500:]}"
        )
        seen.append(steps_saved(folder))
    assert seen == sorted(seen) and seen[-1] > 0, f"resuming went backwards: {seen}"
    finish("train", "--resume", str(folder))
    assert (folder / "model.safetensors").read_bytes() == uninterrupted


def test_interrupted_by_ctrl_c_and_resumed(uninterrupted: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = localgrad(*TRAIN, "train.checkpoint_every=1000", "--run-dir", str(folder))
    assert wait_for_change(folder / "checkpoints", process)  # the first epoch is over
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    said = " ".join(err.split())
    assert said.startswith("error: stopped") and "and saved" in said and f"localgrad train --resume {folder}" in said
    assert "Traceback" not in err
    finish("train", "--resume", str(folder))
    assert (folder / "model.safetensors").read_bytes() == uninterrupted
