"""Ranks that die, hang or lose their connections: the run ends or goes on in bounded time, with nothing lost."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SETTINGS = ["digits", "--alone", "--epochs", "4", "--threads", "1", "--method", "dgl+man", "--batch-size", "128"]
SETTINGS += ["train.checkpoint_every=4", "data.augment=true"]
TIMEOUT = 10
# torchrun gives the ranks that are left 30 s to end by themselves before it kills them.
BOUND = TIMEOUT + 30 + 30
PATIENCE = 600  # of these tests, on machines that do other things


def launched(folder: Path, *words: str, restarts: int = 0, ranks: int = 2) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    command += ["--standalone", "--monitor-interval=0.1", "-m", "localgrad", "train", *SETTINGS]
    command += ["--run-dir", str(folder), "--timeout", str(TIMEOUT), *words]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with log_of(folder).open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def log_of(folder: Path) -> Path:
    """What the ranks of a run and their launcher printed."""
    return folder.with_name(folder.name + ".log")


def ended(launcher: subprocess.Popen[bytes], folder: Path, timeout: float) -> str:
    """Its output, once it has ended; it and its ranks are gone afterwards in any case."""
    try:
        launcher.wait(timeout)
        assert not family(launcher.pid)
    finally:
        end(launcher)
    return log_of(folder).read_text()


def family(pid: int) -> list[int]:
    """The processes that ``pid`` started, and they in turn."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *family(child)]
    return found


def workers(launcher: subprocess.Popen[bytes]) -> list[int]:
    """The ranks that run now."""
    found = []
    for pid in family(launcher.pid):
        with contextlib.suppress(OSError):
            if b"\0train\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def close_connections(pid: int) -> None:
    """Shut the sockets of another process, as a network that fails would."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.pidfd_open(pid)
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if not os.readlink(entry).startswith("socket:"):
                continue
            descriptor = libc.syscall(438, handle, int(entry.name), 0)  # pidfd_getfd
            if descriptor >= 0:
                with socket.socket(fileno=descriptor) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
    os.close(handle)


ACTS = {
    "SIGKILL": lambda pid: os.kill(pid, signal.SIGKILL),
    "SIGSTOP": lambda pid: os.kill(pid, signal.SIGSTOP),
    "closed connections": close_connections,
}


def steps_saved(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("step*") if (path / "complete.json").is_file()}


def end(launcher: subprocess.Popen[bytes]) -> None:
    """Leave nothing behind, whatever happened."""
    for pid in (*family(launcher.pid), launcher.pid):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


def disturbed(folder: Path, acts: list[str], seed: int) -> dict[str, torch.Tensor]:
    """A run in which one rank after the other is hit, each some time after a new checkpoint."""
    draw = random.Random(seed)
    launcher = launched(folder, "--parallel", "block=2", restarts=len(acts) + 5)
    known: set[str] = set()
    hit: set[int] = set()
    deadline = time.monotonic() + PATIENCE
    try:
        while launcher.poll() is None:
            assert time.monotonic() < deadline, f"no progress in {PATIENCE} s\n{log_of(folder).read_text()[-4000:]}"
            new = steps_saved(folder) - known
            if new:
                deadline = time.monotonic() + PATIENCE
            ranks = [pid for pid in workers(launcher) if pid not in hit]
            if new and acts and len(ranks) == 2:
                known |= new
                time.sleep(draw.random())
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    ACTS[acts[-1]](draw.choice(ranks))
                    acts.pop()
                    hit |= set(ranks)
            time.sleep(0.05)
        assert launcher.returncode == 0, log_of(folder).read_text()[-4000:]
        assert not acts, f"the run ended before {acts}"
        assert not family(launcher.pid)
    finally:
        end(launcher)
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    launcher = launched(folder, "--parallel", "block=2")
    output = ended(launcher, folder, PATIENCE)
    assert launcher.returncode == 0, output
    return load_file(folder / "model.safetensors")


@pytest.mark.slow_distributed
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("run", range(10))
def test_hits_change_nothing(run: int, undisturbed: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Thirty hits in all, three a run."""
    order = ["SIGKILL"] * 14 + ["SIGSTOP"] * 6 + ["closed connections"] * 10
    random.Random(0).shuffle(order)
    acts = order[3 * run : 3 * run + 3]
    began = time.monotonic()
    found = disturbed(tmp_path / "run", list(acts), seed=run)
    print(f"run {run}: {', '.join(acts)}: {time.monotonic() - began:.0f} s", flush=True)
    assert found.keys() == undisturbed.keys()
    assert all(torch.equal(found[name], undisturbed[name]) for name in undisturbed)


@pytest.mark.slow_distributed
def test_without_restarts_a_dead_rank_ends_the_job_with_a_message(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = launched(folder, "--parallel", "data=2")
    try:
        while not steps_saved(folder):
            assert launcher.poll() is None, log_of(folder).read_text()
            time.sleep(0.05)
        os.kill(workers(launcher)[0], signal.SIGKILL)
    except BaseException:
        end(launcher)
        raise
    output = ended(launcher, folder, BOUND)
    assert launcher.returncode != 0 and "lost its peers while" in output and "--max-restarts" in output


@pytest.mark.slow_distributed
def test_a_folder_that_cannot_be_written_ends_the_job_with_a_message(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").write_text("a file where a folder is wanted")
    launcher = launched(folder, "--parallel", "block=2")
    output = ended(launcher, folder, PATIENCE)
    assert launcher.returncode != 0 and "could not save the checkpoint" in output


@pytest.mark.slow_distributed
@pytest.mark.timeout(2 * PATIENCE)
def test_two_by_two_on_the_command_line(tmp_path: Path) -> None:
    """Output, metrics and results come out once; blocks on other ranks change no weight of two replicas."""
    weights = {}
    for name, parallel, ranks in (("2x2", "data=2,block=2", 4), ("data", "data=2", 2)):
        folder = tmp_path / name
        launcher = launched(folder, "--parallel", parallel, ranks=ranks)
        output = ended(launcher, folder, PATIENCE)
        assert launcher.returncode == 0, output
        assert output.count("dgl+man 4/4") == 1 and output.count("test accuracy of every head") == 1
        assert len((folder / "metrics.csv").read_text().splitlines()) == 5
        weights[name] = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights["2x2"][key], value) for key, value in weights["data"].items())


def test_misuse_of_the_command_is_refused_at_once(tmp_path: Path) -> None:
    """In this process: nothing is started before the words make sense."""
    from typer.testing import CliRunner

    from localgrad.cli import app

    for words, message in (
        (["--parallel", "data=2"], "needs --run-dir"),
        (["--parallel", "data=0", "--run-dir", str(tmp_path)], "is no axis; write data=2"),
        (["--parallel", "data=2,block=2", "--run-dir", str(tmp_path)], "torchrun --nproc-per-node=4"),
    ):
        result = CliRunner().invoke(app, ["train", "digits", "--alone", *words])
        assert result.exit_code != 0 and message in str(result.exception), result.output
    assert not list(tmp_path.iterdir())
