"""A queue of experiments for one NVIDIA GPU that is there for a few minutes at a time, on one machine after the other.

Runs from the source tree with nothing installed and no network: it needs Python >= 3.11 with torch, and finds the other
libraries on the machine or in a folder of wheels.

    scripts/gpu_check.sh                        # the most urgent ones that fit; again: goes on where it stopped
    scripts/gpu_check.sh tests accuracy-dgl     # only those whose names begin so, also if they failed before
    scripts/gpu_check.sh --list                 # what there is, what it decides, and how it stands
    GPU_CHECK_DEVICE=cpu scripts/gpu_check.sh   # dry run at tiny sizes on the CPU

Environment:

    GPU_CHECK_SECONDS   how long a call may take, 570; then everything is told to stop (SIGTERM: training saves itself)
    GPU_CHECK_LANES     how many run beside each other, 2; what measures times always runs alone
    GPU_CHECK_RESULTS   folder that results/DATE-GPU is made in, results
    GPU_CHECK_STATE     folder with queue.json and unfinished training runs, runs/gpu_check; it is what to carry
    GPU_CHECK_MIB       the most that state and results of the queue may hold, 60; no run begins that may exceed it
    GPU_CHECK_ARCHIVE   one .tar.gz of both: unpacked first, written last
    GPU_CHECK_WHEELS    folder of .whl files; those of libraries that the machine lacks are unpacked
    GPU_CHECK_COMMIT    where there is no git: the commit that the sources are of
    LOCALGRAD_DATA      data sets, shared/data where that exists

What failed is run again when the sources have changed, or when it is named. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from gpu_experiments import Experiment, experiments

ROOT = Path(__file__).parents[1]
GRACE = 20  # seconds between SIGTERM and SIGKILL: training writes a checkpoint
KEPT = ("config.yaml", "metrics.csv", "results.json")  # of a training run that has ended
PROBE = """
import json, platform, sys
try:
    import torch, torchvision, timm, typer, rich, yaml, safetensors, greenlet, pytest, localgrad.cli
except ImportError as error:
    sys.exit(f"gpu_check: {error}; install it for {sys.executable}, put its wheel into the folder GPU_CHECK_WHEELS, or "
             "name another Python in PYTHON=")
cuda = sys.argv[1] == "cuda"
if cuda and not torch.cuda.is_available():
    sys.exit("gpu_check: torch sees no GPU; GPU_CHECK_DEVICE=cpu makes a dry run")
device = torch.cuda.get_device_properties(0) if cuda else None
print(json.dumps({
    "gpu": device.name if cuda else "cpu", "gpu_bytes": device.total_memory if cuda else 0,
    "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "processor": platform.processor(),
    "python": platform.python_version(), "platform": platform.platform(),
    **{name: sys.modules[name].__version__ for name in ("torch", "torchvision", "timm", "typer", "greenlet")},
}))
"""


def unpacked(wheels: Path, to: Path) -> list[str]:
    """Unpack the wheels that fit this Python, of libraries that it lacks; their names and versions."""
    ours, found = sys.version_info[:2], []
    for path in sorted(wheels.glob("*.whl")):
        name, version, *_, python, abi, platform = path.stem.split("-")
        fits = "py3" in python or f"cp{ours[0]}{ours[1]}" in python
        fits |= abi == "abi3" and any(int(minor) <= ours[1] for minor in re.findall(r"cp3(\d+)", python))
        if not fits or (platform != "any" and os.uname().machine not in platform):
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            continue
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(to)
        found.append(f"{name} {version}")
    return found


def bytes_in(*folders: Path) -> int:
    """Of all files below."""
    return sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())


def commit_of(environment: dict[str, str]) -> tuple[str, str]:
    """The commit, ``+`` where files differ from it, and a digest of the sources, which needs no git."""
    digest = hashlib.sha256()
    for path in sorted(p for top in ("src", "tests", "bench", "scripts") for p in (ROOT / top).rglob("*.py")):
        digest.update(path.read_bytes())
    try:
        git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
        commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        commit += "+" * bool(git(["git", "status", "--short"]).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        commit = environment.get("GPU_CHECK_COMMIT", "unknown")
    return commit, digest.hexdigest()[:12]


@dataclass
class Job:
    """An experiment at work."""

    experiment: Experiment
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float
    stopped: bool = False


class Queue:
    """The experiments of one call, and what is known of them from earlier ones.

    Args:
        device: ``cuda`` or ``cpu``.
        state: folder with ``queue.json`` and ``runs``.
        results: folder in which one is made for each day and GPU.
        environment: of the experiments.
        deadline: `time.monotonic` at which everything has ended.
    """

    def __init__(self, device: str, state: Path, results: Path, environment: dict[str, str], deadline: float) -> None:
        self.device, self.state, self.results, self.deadline = device, state, results, deadline
        self.environment = environment
        self.most = int(environment.get("GPU_CHECK_MIB", "60")) * 2**20
        self.lanes = int(environment.get("GPU_CHECK_LANES", "2"))
        self.all = experiments(device)
        self.file = state / "queue.json"
        self.records: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.running: list[Job] = []
        self.ended: list[str] = []
        self.asked = False

    def ask(self, *_: Any) -> None:
        """Stop as soon as everything has saved itself."""
        self.asked = True

    def left(self) -> float:
        """Seconds that something may still run before it is told to stop."""
        return self.deadline - time.monotonic() - GRACE

    def open(self, machine: dict[str, Any], unpacked_wheels: list[str]) -> None:
        """Name the folder of results, and write down on what they are measured."""
        name = "-".join(machine["gpu"].lower().replace("nvidia", "").split())
        self.commit, self.sources = commit_of(self.environment)
        self.out = self.results / f"{time.strftime('%Y-%m-%d')}-{name}"
        self.out.mkdir(parents=True, exist_ok=True)
        driver = shutil.which("nvidia-smi") if self.device == "cuda" else None
        stay = {
            "began": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": self.commit, "sources": self.sources, **machine,
            "cores": os.cpu_count(), "unpacked": unpacked_wheels, "lanes": self.lanes,
            "nvidia-smi": subprocess.run([driver], capture_output=True, text=True).stdout if driver else "",
        }  # fmt: skip
        file = self.out / "machine.json"
        stays = json.loads(file.read_text()) if file.is_file() else []
        file.write_text(json.dumps([*stays, stay], indent=1) + "\n")
        self.note(f"{machine['gpu']}, commit {self.commit}, {self.left():.0f} s, {self.lanes} lanes")

    def note(self, text: str) -> None:
        """Say it, and keep it."""
        line = f"{time.strftime('%H:%M:%S')}  {text}"
        print(line, flush=True)
        with (self.out / "stays.log").open("a") as file:
            file.write(line + "\n")

    def record(self, name: str, **changes: Any) -> None:
        """Change what is known of one, on the disk too."""
        self.records[name] = {**self.records.get(name, {}), **changes}
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.records, indent=1) + "\n")
        partial.replace(self.file)

    def size(self, one: Experiment) -> float:
        """Seconds it will take: more than an earlier call, in which it did not end, could give it."""
        return one.seconds if one.trains else max(one.seconds, 1.5 * self.records.get(one.name, {}).get("tried", 0))

    def held(self) -> int:
        """Bytes that are carried."""
        return bytes_in(self.state, *{self.results / r["results"] for r in self.records.values() if "results" in r})

    def pending(self, asked: list[str]) -> list[Experiment]:
        """What is to be run in this call."""
        found = []
        for one in self.all:
            known = self.records.get(one.name, {})
            again = known.get("status") != "failed" or bool(asked) or known.get("sources") != self.sources
            if known.get("status") != "done" and again and one.name.startswith(tuple(asked or [""])):
                found.append(one)
        return found

    def next(self, pending: list[Experiment]) -> Experiment | None:
        """The most urgent one that may begin now. One that runs alone waits for the others, and they for it."""
        if len(self.running) >= self.lanes or any(job.experiment.alone for job in self.running):
            return None
        for one in pending:
            if self.left() < (1 if self.device == "cpu" else 30) or (not one.trains and self.size(one) > self.left()):
                continue
            if one.alone and self.running:
                return None
            runs = [bytes_in(path) for path in (self.state / "runs").iterdir()]
            if one.trains and not self.run_of(one).exists() and self.held() + max(runs, default=0) > self.most:
                continue
            return one
        return None

    def run_of(self, one: Experiment) -> Path:
        """The directory of a training run."""
        return self.state / "runs" / one.name

    def start(self, one: Experiment) -> None:
        """Begin it, or go on with it."""
        out, run = self.out / one.name, self.run_of(one)
        out.mkdir(exist_ok=True)
        words = tuple(word.replace("{run}", str(run)).replace("{out}", str(out)) for word in one.command)
        if one.trains and any(run.glob("checkpoints/step*")):
            words = ("-m", "localgrad", "train", "--resume", str(run))
        elif one.trains:
            shutil.rmtree(run, ignore_errors=True)
        log = (out / "log.txt").open("ab")
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.running.append(Job(one, process, log, time.monotonic()))
        self.record(one.name, status="running", command=["python", *one.command], decides=one.decides)

    def finish(self, job: Job) -> None:
        """Keep what one that has ended leaves."""
        self.running.remove(job)
        job.log.close()
        one, out, run = job.experiment, self.out / job.experiment.name, self.run_of(job.experiment)
        seconds = time.monotonic() - job.began
        ended = job.process.returncode == 0
        resumable = one.trains and any(run.glob("checkpoints/step*"))
        status = "done" if ended else "stopped" if job.stopped else "failed"
        if one.trains and ended:
            for name in KEPT:
                shutil.copy2(run / name, out / name)
        if not resumable or status != "stopped":
            shutil.rmtree(run, ignore_errors=True)
        lines = (out / "log.txt").read_text(errors="replace").strip().splitlines()
        before = self.records[one.name].get("seconds", 0) if one.trains else 0
        self.record(
            one.name, status=status, seconds=round(before + seconds, 1), commit=self.commit, sources=self.sources,
            results=self.out.name, **({"tried": round(seconds)} if status == "stopped" else {}),
        )  # fmt: skip
        self.ended.append(status)
        why = f": {lines[-1][:160]}" if lines and not ended else ""
        self.note(f"{one.name}: {status} after {seconds:.0f} s{why}")

    def stop(self) -> None:
        """Tell everything to stop, and wait until it has; what does not is killed, with all that it started."""
        for job in self.running:
            job.stopped = True
            job.process.terminate()
        until = min(time.monotonic() + GRACE, self.deadline)
        for job in list(self.running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(max(until - time.monotonic(), 0.1))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
            self.finish(job)

    def shrink(self) -> None:
        """Give up unfinished runs until the rest may be carried: those first that least time was spent on per byte."""
        runs = {path.name: bytes_in(path) for path in (self.state / "runs").iterdir()}
        while runs and self.held() > self.most:
            name = min(runs, key=lambda run: self.records.get(run, {}).get("seconds", 0) / max(runs[run], 1))
            self.note(f"{name}: given up, {runs.pop(name) / 2**20:.0f} MiB are too much to carry; it begins anew")
            shutil.rmtree(self.state / "runs" / name)
            self.record(name, status="given up", seconds=0)

    def run(self, asked: list[str]) -> None:
        """Run what fits until the time is up."""
        pending = self.pending(asked)
        try:
            while self.left() > 0 and not self.asked:
                for job in [job for job in self.running if job.process.poll() is not None]:
                    self.finish(job)
                while (one := self.next(pending)) is not None:
                    pending.remove(one)
                    self.start(one)
                if not self.running:
                    break
                time.sleep(0.1)
        finally:
            self.stop()
            self.shrink()
            (self.out / "README.md").write_text(self.table())
        rest = f"{len(self.pending(asked))} are left" if pending or "stopped" in self.ended else "nothing is left"
        self.note(f"end: {rest}; {self.held() / 2**20:.1f} MiB to carry; results in {self.out}")

    def table(self) -> str:
        """What there is in the folder of results."""
        stays = json.loads((self.out / "machine.json").read_text())
        lines = [
            f"# {stays[0]['gpu']}, {stays[0]['began'][:10]}", "",
            "Written by `scripts/gpu_check.sh`; one seed each, once. `machine.json` has hardware, versions and commit.",
            "Epochs of what did not run alone are no measure of speed.", "",
            "| experiment | decides | commit | seconds | ended | test score | seconds an epoch | alone |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for one in self.all:
            known = self.records.get(one.name, {})
            if known.get("results") == self.out.name:
                score, epoch = _scored(self.out / one.name)
                cells = (one.name, one.decides, known["commit"], known["seconds"], known["status"], score, epoch)
                lines.append("| " + " | ".join(map(str, (*cells, "yes" if one.alone else ""))) + " |")
        return "\n".join(lines) + "\n"


def _scored(folder: Path) -> tuple[str, str]:
    """Test score of the model at the last epoch and seconds of the fastest epoch of a training run that has ended."""
    if not (folder / "results.json").is_file():
        return "", ""
    score = json.loads((folder / "results.json").read_text())[0]["last"]["score"]["model"]
    with (folder / "metrics.csv").open() as file:
        return f"{score:.4f}", f"{min(float(row['seconds']) for row in csv.DictReader(file)):.3f}"


def main() -> int:
    """The command."""
    began = time.monotonic()
    environment = {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **os.environ}
    device = environment.get("GPU_CHECK_DEVICE", "cuda")
    state = Path(environment.get("GPU_CHECK_STATE", ROOT / "runs/gpu_check")).absolute()
    results = Path(environment.get("GPU_CHECK_RESULTS", ROOT / "results")).absolute()
    archive = environment.get("GPU_CHECK_ARCHIVE")
    asked = sys.argv[1:]
    known = [one.name for one in experiments(device)]
    unknown = [name for name in asked if name != "--list" and not any(one.startswith(name) for one in known)]
    if unknown:
        print(f"gpu_check: no experiment begins with {unknown[0]!r}; see --list", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as libraries:
        wheels = environment.get("GPU_CHECK_WHEELS")
        found = unpacked(Path(wheels), Path(libraries)) if wheels else []
        paths = [str(ROOT / "src"), libraries, environment.get("PYTHONPATH", "")]
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "LOCALGRAD_DEVICE": device}
        if device == "cpu":
            environment.setdefault("OMP_NUM_THREADS", "1")
        if (ROOT / "shared/data").is_dir():
            environment.setdefault("LOCALGRAD_DATA", str(ROOT / "shared/data"))
        deadline = began + float(environment.get("GPU_CHECK_SECONDS", "570"))
        if asked == ["--list"]:
            queue = Queue(device, state, results, environment, deadline)
            for one in queue.all:
                status = queue.records.get(one.name, {}).get("status", "")
                print(f"{one.priority}  {one.name:34} {one.seconds:4} s  {status:8} {one.decides}")
            return 0
        probe = [sys.executable, "-c", PROBE, device]
        machine = subprocess.run(probe, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if machine.returncode:
            return 2
        (state / "runs").mkdir(parents=True, exist_ok=True)
        results.mkdir(parents=True, exist_ok=True)
        if archive and Path(archive).is_file():
            with tarfile.open(archive) as tar:
                for member in tar:
                    ours = member.name.partition("/")[0] in ("queue.json", "runs")
                    tar.extract(member, state if ours else results, filter="data")
        queue = Queue(device, state, results, environment, deadline)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, queue.ask)
        queue.open(json.loads(machine.stdout.splitlines()[-1]), found)
        queue.run(asked)
        if archive:
            with tarfile.open(f"{archive}.partial", "w:gz") as tar:
                for name in ("queue.json", "runs"):
                    if (state / name).exists():
                        tar.add(state / name, name)
                for name in sorted({record["results"] for record in queue.records.values() if "results" in record}):
                    tar.add(results / name, name)
            Path(f"{archive}.partial").replace(archive)
    return 1 if "failed" in queue.ended else 0


if __name__ == "__main__":
    sys.exit(main())
