"""What ends a run from outside: one paragraph, an exit code, and it goes on to the bits of one that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["localgrad.train.run", "localgrad.cli.train"])
RUN = ["train", "digits", "beside=[]", "data.limit=200", "train.batch_size=16", "train.threads=1", "--epochs", "3"]
RUN += ["train.checkpoint_every=2", "--model", "resnet8", "--num-blocks", "2"]
PATIENCE = 60.0


def command(words: list[str], folder: str, prepare: Callable[[], object] | None) -> None:
    """``localgrad WORDS`` in this process; what it says goes to the file ``said``."""
    os.chdir(folder)
    file = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    if prepare is not None:
        prepare()
    from localgrad.cli import main

    main(words)


def started(folder: Path, words: list[str], prepare: Callable[[], object] | None = None) -> multiprocessing.Process:
    process = CONTEXT.Process(target=command, args=(words, str(folder), prepare))
    process.start()
    return process


def ended(process: multiprocessing.Process, folder: Path) -> tuple[int | None, str]:
    """Its exit code and what it said, on one line."""
    process.join(PATIENCE)
    process.kill()
    return process.exitcode, " ".join((folder / "said").read_text().split())


def wait_for_checkpoint(folder: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not list(folder.glob("run/checkpoints/step*/complete.json")):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert ended(started(folder, [*RUN, "--run-dir", "run"]), folder)[0] == 0
    return load_file(folder / "run" / "model.safetensors")


def goes_on(folder: Path, whole: dict[str, torch.Tensor]) -> None:
    code, said = ended(started(folder, ["train", "--resume", "run"]), folder)
    assert code == 0, said
    found = load_file(folder / "run" / "model.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], value) for name, value in whole.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_and_saves(number: signal.Signals, tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    process = started(tmp_path, [*RUN, "--run-dir", "run"])
    wait_for_checkpoint(tmp_path)
    os.kill(process.pid or 0, number)
    code, said = ended(process, tmp_path)
    assert code == 130 and "saved; continue with: localgrad train --resume run" in said and "Traceback" not in said
    goes_on(tmp_path, whole)


def ignore_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_nohup_is_heeded(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    process = started(tmp_path, [*RUN, "--run-dir", "run"], ignore_hangup)
    wait_for_checkpoint(tmp_path)
    os.kill(process.pid or 0, signal.SIGHUP)
    code, said = ended(process, tmp_path)
    assert code == 0, said
    assert all(torch.equal(load_file(tmp_path / "run/model.safetensors")[name], value) for name, value in whole.items())


def close_output() -> None:
    """Give the process a standard output that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def keep_words_until_trained() -> None:
    """The reader of the output goes after the first words."""
    from localgrad.train.run import RunFolder

    begin = RunFolder.begin

    def then_close(folder: RunFolder, settings: str, job: str | None = None, wire: str = "same") -> None:
        begin(folder, settings, job, wire)
        close_output()

    RunFolder.begin = then_close


def test_a_reader_that_goes_stops_and_saves(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    code, said = ended(started(tmp_path, [*RUN, "--run-dir", "run"], keep_words_until_trained), tmp_path)
    assert code == 130 and "error: stopped after epoch 1 and saved; continue with:" in said
    assert "Traceback" not in said and "BrokenPipe" not in said
    goes_on(tmp_path, whole)


def test_nobody_reads_a_list(tmp_path: Path) -> None:
    code, said = ended(started(tmp_path, ["list", "methods"], close_output), tmp_path)
    assert code == 1 and not said


def test_the_directory_goes(tmp_path: Path) -> None:
    process = started(tmp_path, [*RUN, "--epochs", "1000", "--run-dir", "run"])
    wait_for_checkpoint(tmp_path)
    (tmp_path / "run").rename(tmp_path / "away")
    shutil.rmtree(tmp_path / "away")
    code, said = ended(process, tmp_path)
    assert code == 2 and said.count("error: ") == 1 and "Traceback" not in said and "run/" in said


def shrink_the_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # write() then fails like on a full disk


def test_the_disk_is_full(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    process = started(tmp_path, [*RUN, "--run-dir", "run"])
    wait_for_checkpoint(tmp_path)
    os.kill(process.pid or 0, signal.SIGTERM)
    assert ended(process, tmp_path)[0] == 130
    saved = {file: file.read_bytes() for file in (tmp_path / "run/checkpoints").rglob("*") if file.is_file()}
    code, said = ended(started(tmp_path, ["train", "--resume", "run"], shrink_the_disk), tmp_path)
    assert code == 2 and said.count("error: ") == 1 and "Traceback" not in said and "Free space" in said
    newest = max(file.parent for file in saved)
    assert all(file.read_bytes() == content for file, content in saved.items() if file.parent == newest)
    goes_on(tmp_path, whole)
