"""The queue of ``scripts/gpu_check.sh``: order, lanes, stops, what it carries; and a dry run of it on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from bench import floors, ladder
from typer.main import get_command

import gpu_queue
from gpu_experiments import Experiment, experiments
from localgrad.cli import app
from localgrad.cli.options import positional, settings_of
from localgrad.spec import build_method, parse_method
from localgrad.tasks import classification

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
ON_A_GPU = experiments("cuda")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a bash script")

# A training run of 60 steps that keeps each of them and stops when it is told to.
TRAINING = """
import json, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[-1])
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
done = max((int(p.name[4:]) for p in (run / "checkpoints").iterdir()), default=0)
(run / "config.yaml").open("a").write(f"from {done}\\n")
for step in range(done + 1, 61):
    time.sleep(0.05)
    (run / "checkpoints" / f"step{step}").write_bytes(bytes(1000))
    if stopped:
        sys.exit(2)
(run / "metrics.csv").write_text("seconds\\n2.5\\n1.5\\n")
(run / "results.json").write_text(json.dumps([{"last": {"score": {"model": 0.5}}}]))
"""


def training(name: str, priority: int = 1) -> Experiment:
    return Experiment(name, priority, 9, "", ("-m", "localgrad", "train", "--run-dir", "{run}"))


def script(name: str, text: str, **changes: Any) -> Experiment:
    return Experiment(name, **{"priority": 1, "seconds": 1, "decides": "", "command": ("-c", text), **changes})


@pytest.fixture
def stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A call with these experiments and so many seconds, its queue afterwards; state stays from call to call."""
    (tmp_path / "path/localgrad").mkdir(parents=True)
    (tmp_path / "path/localgrad/__init__.py").touch()
    (tmp_path / "path/localgrad/__main__.py").write_text(TRAINING)
    (tmp_path / "state/runs").mkdir(parents=True)
    monkeypatch.setattr(gpu_queue, "commit_of", lambda _: ("abc", "sources"))

    def call(found: list[Experiment], seconds: float = 20.0, asked: tuple[str, ...] = (), **settings: str) -> Any:
        monkeypatch.setattr(gpu_queue, "experiments", lambda _: sorted(found, key=lambda one: one.priority))
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "path"), **settings}
        deadline = time.monotonic() + gpu_queue.GRACE + seconds
        queue = gpu_queue.Queue("cpu", tmp_path / "state", tmp_path / "results", environment, deadline)
        queue.open({"gpu": "NVIDIA H1"}, [])
        queue.run(list(asked))
        return queue

    return call


def test_the_most_urgent_first_and_what_is_measured_alone(stay: Any, tmp_path: Path) -> None:
    line = (
        "import time; a = time.monotonic(); time.sleep(.4); open({!r}, 'a').write(f'{} {{a}} {{time.monotonic()}}\\n')"
    )
    times = tmp_path / "times"

    def timed(name: str, priority: int, alone: bool = False) -> Experiment:
        return script(name, line.format(str(times), name), priority=priority, alone=alone)

    ended = stay([timed("d", 4), timed("c", 3, alone=True), timed("a", 1), timed("b", 2)], GPU_CHECK_LANES="2").ended
    assert ended == ["done"] * 4
    spans = {name: (float(a), float(b)) for name, a, b in map(str.split, times.read_text().splitlines())}
    assert spans["a"][0] < spans["b"][1] and spans["b"][0] < spans["a"][1]  # beside each other
    assert max(spans["a"][1], spans["b"][1]) <= spans["c"][0] and spans["c"][1] <= spans["d"][0]


def test_a_run_that_was_stopped_goes_on(stay: Any, tmp_path: Path) -> None:
    queue = stay([training("run"), training("other")], seconds=2.0)
    assert queue.records["run"]["status"] == queue.records["other"]["status"] == "stopped"
    assert 0 < len(list((tmp_path / "state/runs/run/checkpoints").iterdir())) < 60
    queue = stay([training("run"), training("other")])
    assert queue.records["run"]["status"] == "done" and queue.records["run"]["seconds"] > 2
    assert not (tmp_path / "state/runs/run").exists()
    (out,) = (tmp_path / "results").iterdir()
    begun = (out / "run/config.yaml").read_text().split()
    assert begun[1] == "0" and int(begun[3]) > 0, "it began anew"
    assert (
        "| run |  | abc |" in (out / "README.md").read_text()
        and "| 0.5000 | 1.500 |" in (out / "README.md").read_text()
    )
    assert out.name.endswith("-h1") and len(json.loads((out / "machine.json").read_text())) == 2
    assert stay([training("run"), training("other")]).ended == []


def test_what_does_not_fit_waits_and_a_killed_one_counts_as_longer(stay: Any) -> None:
    assert stay([script("long", "", seconds=99), script("short", "", priority=2)]).records.keys() == {"short"}
    queue = stay([script("slow", "import time; time.sleep(60)")], seconds=2.0)
    assert queue.records["slow"]["status"] == "stopped"
    assert queue.size(script("slow", "")) == 3.0


def test_what_failed_runs_again_when_it_is_named(stay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [script("fails", "import sys; print('why'); sys.exit(3)")]
    assert stay(failing).ended == ["failed"]
    assert stay(failing).ended == []
    assert stay(failing, asked=("fail",)).ended == ["failed"]
    monkeypatch.setattr(gpu_queue, "commit_of", lambda _: ("abd", "other sources"))
    assert stay(failing).ended == ["failed"]


def test_no_more_is_kept_than_can_be_carried(stay: Any, tmp_path: Path) -> None:
    for name, megabytes in (("young", 3), ("old", 3)):
        (tmp_path / "state/runs" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "state/runs" / name / "checkpoints/step1").write_bytes(bytes(megabytes * 2**20))
    records = {"young": {"status": "stopped", "seconds": 5}, "old": {"status": "stopped", "seconds": 50}}
    (tmp_path / "state/queue.json").write_text(json.dumps(records))
    later = [training("new"), script("young", "", seconds=99), script("old", "", seconds=99)]
    queue = stay(later, GPU_CHECK_MIB="5")
    assert "new" not in queue.records, "a run has begun that may be too much"
    assert [path.name for path in (tmp_path / "state/runs").iterdir()] == ["old"]
    assert queue.records["young"]["status"] == "given up" and queue.held() <= 5 * 2**20


def test_wheels_of_what_is_lacking_are_unpacked(tmp_path: Path) -> None:
    major, minor = sys.version_info[:2]
    machine = os.uname().machine
    for name in (
        "pytest-9.0-py3-none-any", "lacking_one-1.0-py3-none-any",
        f"lacking_two-1.0-cp{major}{minor}-cp{major}{minor}-manylinux_2_17_{machine}",
        f"lacking_three-1.0-cp38-abi3-manylinux_2_17_{machine}",
        "other_python-1.0-cp36-cp36m-manylinux_2_17_x86_64", f"other_machine-1.0-cp{major}{minor}-none-win_arm64",
    ):  # fmt: skip
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}.py", "")
    found = gpu_queue.unpacked(tmp_path, tmp_path / "to")
    assert sorted(found) == ["lacking_one 1.0", "lacking_three 1.0", "lacking_two 1.0"]
    assert {p.stem for p in (tmp_path / "to").iterdir()} == {"lacking_one", "lacking_two", "lacking_three"}


def test_no_gpu_is_said(tmp_path: Path) -> None:
    environment = {"GPU_CHECK_RESULTS": str(tmp_path), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    refused = subprocess.run(["bash", str(SCRIPT)], env=os.environ | environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "torch sees no GPU; GPU_CHECK_DEVICE=cpu makes a dry run" in refused.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("one", [*ON_A_GPU, *experiments("cpu")], ids=lambda one: one.name)
def test_what_it_runs_exists(one: Experiment) -> None:
    assert one.trains or one.seconds < 570 - gpu_queue.GRACE, "it would never begin"
    first, *words = one.command
    if first != "-m":
        {"bench/ladder.py": ladder, "bench/floors.py": floors}[first].arguments(words)
    elif words[0] == "pytest":
        files = [word.partition("::")[0] for word in words if word.startswith("tests/")]
        assert files and all((ROOT / file).exists() for file in files)
    else:
        command = get_command(app).commands[words[1]]
        given = command.make_context(words[1], words[2:]).params
        if words[1] == "train":
            recipe, overrides = positional(given["recipe"], given["overrides"])
            settings_of(
                recipe, overrides, method=given["method"], blocks__num_blocks=given["num_blocks"],
                train__epochs=given["epochs"],
            )  # fmt: skip
        for method in given["method"] if words[1] == "bench" else [given["method"]]:
            build_method(parse_method(method), classification(10, mean=(0.5,) * 3, std=(0.25,) * 3))


def test_names_are_unique() -> None:
    assert len({one.name for one in ON_A_GPU}) == len(ON_A_GPU)


def test_dry_run(tmp_path: Path) -> None:
    environment = {
        "GPU_CHECK_DEVICE": "cpu", "PYTHON": sys.executable, "GPU_CHECK_RESULTS": str(tmp_path / "results"),
        "GPU_CHECK_STATE": str(tmp_path / "state"), "GPU_CHECK_ARCHIVE": str(tmp_path / "all.tar.gz"),
        "GPU_CHECK_SECONDS": "270",
    }  # fmt: skip
    ran = subprocess.run(["bash", str(SCRIPT)], env=os.environ | environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    queue = json.loads((tmp_path / "state/queue.json").read_text())
    assert {name: record["status"] for name, record in queue.items()} == {
        one.name: "done" for one in experiments("cpu")
    }
    (out,) = (tmp_path / "results").iterdir()
    table = (out / "ladder/resnet8.md").read_text()
    assert "| + channels_last" in table and "| dgl(head=linear), 3 blocks, fp32" in table
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        assert {"queue.json", f"{out.name}/README.md", f"{out.name}/accuracy-dgl/results.json"} <= set(tar.getnames())
