"""Ranks that die, hang or lose their connections: the run ends or goes on in bounded time, with nothing lost."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.transforms.functional import to_pil_image

import localgrad

SETTINGS = ["digits", "beside=[]", "train.threads=1", "--method", "dgl+man", "train.batch_size=128"]
SETTINGS += ["data.augment=true"]
SHORT = ["--epochs", "4", "train.checkpoint_every=4"]
TIMEOUT = 8  # seconds a rank waits for another one
# torchrun gives the ranks that are left 30 s to end by themselves before it kills them; on restarts it heeds no option.
BOUND = TIMEOUT + 30 + 15  # what detecting, reporting and ending may take in all, on a machine under load
PATIENCE = 600  # of these tests, on machines that do other things


def launched(
    folder: Path, *words: str, restarts: int = 0, ranks: int = 2, resume: bool = False
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    command += ["--standalone", "--monitor-interval=0.1", "-m", "localgrad", "train"]
    command += ["--resume", str(folder)] if resume else [*SETTINGS, "--run-dir", str(folder)]
    layout = words.index("--parallel") + 1
    command += [*words[:layout], f"{words[layout]},timeout={TIMEOUT}", *words[layout + 1 :]]
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


def steps_saved(folder: Path) -> set[str]:
    found = (folder / "checkpoints").glob("step????????")  # not .partial
    return {path.name for path in found if (path / "complete.json").is_file()}


def end(launcher: subprocess.Popen[bytes]) -> None:
    """Leave nothing behind, whatever happened."""
    for pid in (*family(launcher.pid), launcher.pid):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


def newest(folder: Path) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    return max((int(name.removeprefix("step")) for name in steps_saved(folder)), default=0)


def check_same(folder: Path, other: Path) -> None:
    """Weights of the last and of the best epoch, scores and metrics are those of another run."""
    found, expected = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    found, expected = (json.loads((path / "result.json").read_text()) for path in (folder, other))
    assert [found[key] for key in ("last", "best", "cuts")] == [expected[key] for key in ("last", "best", "cuts")]
    rows = [list(csv.DictReader((path / "metrics.csv").read_text().splitlines())) for path in (folder, other)]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1]


@pytest.mark.slow_distributed
def test_without_restarts_a_dead_rank_ends_the_job_with_a_message(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = launched(folder, *SHORT, "--parallel", "data=2")
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
    launcher = launched(folder, *SHORT, "--parallel", "block=2")
    output = ended(launcher, folder, PATIENCE)
    assert launcher.returncode != 0 and "could not save the checkpoint" in output


def until_saved(launcher: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """Wait for a checkpoint of at least this step."""
    while newest(folder) < step:
        assert launcher.poll() is None, log_of(folder).read_text()
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


SIX = ["--epochs", "6", "train.checkpoint_every=2"]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the same run in one process, without --parallel."""
    folder = tmp_path_factory.mktemp("single") / "run"
    command = [sys.executable, "-m", "localgrad", "train", *SETTINGS, *SIX, "--run-dir", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


@pytest.mark.slow_distributed
@pytest.mark.timeout(2 * PATIENCE)
def test_a_killed_launcher_leaves_nothing_and_one_process_takes_all_blocks(single: Path, tmp_path: Path) -> None:
    """Every batch is in the final lineage once, whoever trained it, or weights would differ."""
    folder = tmp_path / "run"
    launcher = launched(folder, *SIX, "--parallel", "block=2")
    try:
        until_saved(launcher, folder, 20)
        ranks = workers(launcher)
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 10
        while any(map(alive, ranks)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(ranks) == 2 and not any(map(alive, ranks))
    finally:
        end(launcher)
    whole = newest(folder)
    partial = folder / "checkpoints" / f"step{whole + 2:08d}.partial"  # what a kill in mid-save leaves
    shutil.copytree(folder / "checkpoints" / f"step{whole:08d}", partial, dirs_exist_ok=True)
    (partial / "complete.json").unlink()
    (partial / min(path.name for path in partial.glob("*.safetensors"))).write_bytes(b"half")
    launcher = launched(folder, "--parallel", "block=1", ranks=1, resume=True)
    output = ended(launcher, folder, PATIENCE)
    assert launcher.returncode == 0, output
    check_same(folder, single)


@pytest.mark.slow_distributed
@pytest.mark.timeout(2 * PATIENCE)
def test_a_stop_signal_on_one_rank_stops_all_at_one_step(single: Path, tmp_path: Path) -> None:
    """A run that ends this way continues exactly."""
    folder = tmp_path / "run"
    launcher = launched(folder, *SIX, "--parallel", "block=2")
    try:
        until_saved(launcher, folder, 10)
        os.kill(workers(launcher)[1], signal.SIGTERM)
    except BaseException:
        end(launcher)
        raise
    output = ended(launcher, folder, BOUND)
    steps = re.findall(r"stopped at step (\d+)", output)  # ranks may write to one line
    assert launcher.returncode != 0 and len(steps) == 2 and steps[0] == steps[1] == str(newest(folder)), output
    launcher = launched(folder, "--parallel", "block=2", resume=True)
    output = ended(launcher, folder, PATIENCE)
    assert launcher.returncode == 0, output
    check_same(folder, single)


def draw_images(folder: Path, seeds: dict[str, int]) -> None:
    """Two classes, four images to train on and two to test on each, 8x8, by the seed of each split."""
    for split, number in (("train", 4), ("val", 2)):
        generator = torch.Generator().manual_seed(seeds[split])
        for name in ("cats", "dogs"):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = torch.randint(0, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)
                to_pil_image(pixels).save(folder / split / name / f"{index}.png")


@pytest.mark.slow_distributed
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("differing", ["settings", "first images of the train split", "first images of the test split"])
def test_ranks_with_other_settings_or_data_are_refused_by_all(differing: str, tmp_path: Path) -> None:
    """Each rank is given something else; nothing is trained."""
    folder = tmp_path / "run"
    for rank in range(2):
        seeds = {"train": rank if "train" in differing else 2, "val": rank if "test" in differing else 3}
        draw_images(tmp_path / f"part{rank}" / "images", seeds)
    words = ["--model", "resnet8", "--data", "folder:images", "--method", "dgl", "-k", "4", "--epochs", "1"]
    words += ["data.image_size=8", "data.validation=0", "train.threads=1"]
    if differing == "settings":
        words += ["train.seed=RANK"]
    shell = 'cd part$RANK && exec "$0" -m localgrad train "${@//RANK/$RANK}"'
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    command += ["bash", "-c", shell, sys.executable, *words, "--run-dir", str(folder)]
    command += ["--parallel", f"data=2,timeout={TIMEOUT}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path)
    output = " ".join((found.stdout + found.stderr).split())
    assert found.returncode != 0
    assert output.count(f"rank 1 does not run the same job as rank 0: {differing} is") == 2, output
    assert not (folder / "checkpoints").exists()


@pytest.mark.slow_distributed
@pytest.mark.timeout(2 * PATIENCE)
def test_two_by_two_on_the_command_line(tmp_path: Path) -> None:
    """Output, metrics and results come out once; blocks on other ranks change no weight of two replicas."""
    weights = {}
    for name, parallel, ranks in (("2x2", {"block": 2, "data": 2}, 4), ("data", {"block": 1, "data": 2}, 2)):
        folder = tmp_path / name
        layout = ",".join(f"{axis}={number}" for axis, number in parallel.items())
        launcher = launched(folder, *SHORT, "train.loggers=[csv,tensorboard]", "--parallel", layout, ranks=ranks)
        output = ended(launcher, folder, PATIENCE)
        assert launcher.returncode == 0, output
        assert output.count("dgl+man 4/4") == 1 and output.count("test accuracy of every head") == 1
        assert len((folder / "metrics.csv").read_text().splitlines()) == 5
        assert len(list((folder / "tensorboard").iterdir())) == 1
        assert json.loads((folder / "result.json").read_text())["parallel"] == parallel | {"wire": "same"}
        weights[name] = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights["2x2"][key], value) for key, value in weights["data"].items())


def test_misuse_of_the_command_is_refused_at_once(tmp_path: Path) -> None:
    """In this process: nothing is started before the words make sense."""
    from typer.testing import CliRunner

    from localgrad.cli import app

    for words, message in (
        (["--parallel", "data=2"], "needs --run-dir"),
        (["--parallel", "data=0", "--run-dir", str(tmp_path)], "'data=0' is none of data=2"),
        (["--parallel", "data=2,block=2", "--run-dir", str(tmp_path)], "torchrun --nproc-per-node=4"),
        (["--parallel", "data=2,wire=int8", "--run-dir", str(tmp_path)], "add block=2 to --parallel"),
        (["--parallel", "block=2", "--run-dir", str(tmp_path), "train.precision=fp16"], "use bf16 with block > 1"),
        (["--parallel", "block=2", "--run-dir", str(tmp_path), "train.capture=true"], "leave it out with --parallel"),
        (["--parallel", "data=2", "--run-dir", str(tmp_path), "train.ema_decay=0.9"], "leave it out with --parallel"),
        (["--parallel", "data=2", "--run-dir", str(tmp_path), "beside=[[e2e]]"], "trains one method"),
    ):
        alone = [] if "--beside" in words else ["beside=[]"]
        result = CliRunner().invoke(app, ["train", "digits", *alone, *words])
        assert result.exit_code != 0 and message in str(result.exception), result.output
    assert not list(tmp_path.iterdir())


def test_what_a_job_finds_and_what_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wire format is kept; a restart continues what this job began, and nothing else."""
    from localgrad import config
    from localgrad.recipes import read_recipe
    from localgrad.train import parallel
    from localgrad.train.folder import RunFolder

    settings = dataclasses.replace(config.validate(read_recipe("digits"), "digits"), beside=[])
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)

    def claimed(layout: str, resume: bool = False, overwrite: bool = False) -> tuple[bool, str]:
        folder = RunFolder(tmp_path)
        try:
            return parallel._claimed(folder, settings, parallel.parsed(layout), resume=resume, overwrite=overwrite)
        finally:
            folder.close()

    assert claimed("block=2,wire=int8") == (False, "int8")
    old = tmp_path / "checkpoints" / "step00000001"
    old.mkdir(parents=True)
    assert claimed("block=2", resume=True) == claimed("block=2,wire=int8", resume=True) == (True, "int8")
    for layout, message in (
        ("block=2,wire=bf16", "was begun with wire=int8 and cannot go on with bf16"),
        ("block=1", "wire=int8 rounds features between ranks along the blocks"),
    ):
        with pytest.raises(localgrad.ConfigError, match=message):
            claimed(layout, resume=True)
    with pytest.raises(localgrad.ConfigError, match="already holds a run"):
        claimed("block=2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for overwrite in (False, True):
        assert claimed("block=2", overwrite=overwrite) == (True, "int8") and old.is_dir()
    monkeypatch.setattr(parallel, "_job", lambda: "another job")
    with pytest.raises(localgrad.ConfigError, match="already holds a run"):
        claimed("block=2")
    assert claimed("block=2", overwrite=True) == (False, "same") and not old.exists()
    assert claimed("block=2", overwrite=True) == (True, "same")  # which the same job now has begun


@pytest.mark.slow_distributed
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("restarts", [0, 3])
def test_a_finished_run_is_never_taken_for_one_that_a_restart_continues(restarts: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["--parallel", "block=2", "--epochs", "1"]
    ended(launched(folder, *words, "train.seed=1"), folder, PATIENCE)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    launcher = launched(folder, *words, "train.seed=2", restarts=restarts)
    output = ended(launcher, folder, PATIENCE)
    assert launcher.returncode != 0 and "already holds a run" in " ".join(output.split())
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    launcher = launched(folder, *words, "train.seed=2", "--overwrite", restarts=restarts)
    assert ended(launcher, folder, PATIENCE) and launcher.returncode == 0
    launcher = launched(tmp_path / "fresh", *words, "train.seed=2")
    assert ended(launcher, tmp_path / "fresh", PATIENCE) and launcher.returncode == 0
    check_same(folder, tmp_path / "fresh")


STOPPED = 16  # the second of four epochs has begun
STOPPING = f"""
import os, runpy, sys
from localgrad.train.folder import RunFolder
save = RunFolder.save
def once(self, run):
    save(self, run)
    if run.step == {STOPPED}:
        os._exit(0)
RunFolder.save = once
sys.argv = sys.argv[1:]
runpy.run_module("localgrad", run_name="__main__")
"""
SHAPES = {"one process": "", "block=2": "block=2", "data=2": "data=2", "block=2,data=2": "block=2,data=2"}


def trained_as(shape: str, folder: Path, script: Path | None = None, resume: bool = False) -> None:
    """A run of ``SHORT`` in the given layout, whole, up to step `STOPPED` by ``script``, or from there."""
    layout = SHAPES[shape]
    ranks = {"": 0, "block=2,data=2": 4}.get(layout, 2)
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    command += [str(script), "localgrad"] if script else ["-m", "localgrad"]
    command += ["train", "--resume", str(folder)] if resume else ["train", *SETTINGS, *SHORT, "--run-dir", str(folder)]
    command += ["--parallel", layout] if layout else []
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow_distributed
@pytest.mark.timeout(8 * PATIENCE)
def test_every_layout_continues_every_other_one(tmp_path: Path) -> None:
    """Blocks on other ranks change no bit; replicas see half of a batch each, so theirs are two runs of their own.

    A run that was stopped and continued as it began ends like one that never was. What one layout saved, another
    continues as it would have continued the same state of its own.
    """
    script = tmp_path / "stopping.py"
    script.write_text(STOPPING)
    for shape in SHAPES:
        trained_as(shape, tmp_path / shape)
        trained_as(shape, tmp_path / f"{shape} begun", script)
    check_same(tmp_path / "one process", tmp_path / "block=2")
    check_same(tmp_path / "data=2", tmp_path / "block=2,data=2")
    for begun in SHAPES:
        for shape in SHAPES:
            folder = tmp_path / f"{begun} to {shape}"
            shutil.copytree(tmp_path / f"{begun} begun", folder)
            trained_as(shape, folder, resume=True)
            split = "data=2" in begun, "data=2" in shape
            first = {False: "one process", True: "data=2"}
            same = tmp_path / shape if split[0] == split[1] else tmp_path / f"{first[split[0]]} to {first[split[1]]}"
            check_same(folder, same)
            print(f"| {begun} | {shape} | as {same.name} |", flush=True)
