"""Kills runs at random moments, has them continued, and compares what they leave with a run that was left alone.

python bench/kills.py --number 60 --out results/reliability-2026-11-28/kills.jsonl

Each line is one run and what happened to it. An act hits one process from outside at a random time: ``SIGKILL``,
``SIGSTOP``, ``connections`` (its sockets are shut), ``launcher`` (torchrun itself is killed). Or a process kills itself
between two random operations on files of the run (``at a file``): within a save, or between two files. Torchrun may
restart the job, or else a command resumes the run, maybe in another layout that must give the same bits. Right is:
``equal`` (weights, scores, best epoch and metrics, to the last bit), and no process left. The exit code is 1 if
anything else happened.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from localgrad.train.folder import RunFolder

RUN = ["digits", "data.limit=400", "data.augment=true", "train.batch_size=32", "train.epochs=4", "train.threads=1"]
RUN += ["train.checkpoint_every=4", "model.name=resnet8", "blocks.num_blocks=4", "--method", "dgl+man"]
LAYOUTS = {"one process": 1, "block=2": 2, "data=2": 2, "block=2,data=2": 4, "compare": 1}
ALIKE = [{"one process", "block=2"}, {"data=2", "block=2,data=2"}, {"compare"}]  # layouts that give the same bits
TIMEOUT = 15  # seconds a rank waits for another one
PATIENCE = 180.0
RIGHT = ("equal",)
TOKEN, KILL = "LOCALGRAD_KILLS_RUN", "LOCALGRAD_KILLS_AT"


def as_rank() -> int:
    """``localgrad`` in this process, which counts what it does to files of its run and may end itself at one."""
    wanted = json.loads(os.environ[KILL])
    rank, counted = int(os.environ.get("RANK", "0")), 0
    folder, marker = os.environ[TOKEN], Path(os.environ[TOKEN] + ".marker")

    def heed(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        if event not in ("open", "os.rename", "os.remove", "os.mkdir") or folder not in str(arguments[0]):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        counted += 1
        if wanted == [rank, counted] and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heed)
    from localgrad.cli import main

    sys.argv = sys.argv[1:]
    try:
        main()
    finally:
        Path(f"{folder}.count{rank}").write_text(str(counted))
    return 0


def started(layout: str, folder: Path, *, resume: bool = False, restarts: int = 0, kill: Any = None) -> Any:
    """The process of a command, or torchrun's."""
    ranks = LAYOUTS[layout]
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        command += ["--standalone", "--monitor-interval=0.1"]
    command += [__file__, "as rank"]
    if layout == "compare":
        command += ["compare", *RUN, "--keep", "--out", str(folder)]
    else:
        command += ["train", *(["--resume", str(folder)] if resume else [*RUN, "beside=[]", "--run-dir", str(folder)])]
        command += ["--parallel", f"{layout},timeout={TIMEOUT}"] if ranks > 1 else []
    environment = os.environ | {
        TOKEN: str(folder), KILL: json.dumps(kill), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    with log_of(folder).open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def log_of(folder: Path) -> Path:
    """What all processes of a run said."""
    return folder.with_suffix(".log")


def processes(folder: Path, word: str = "") -> list[int]:
    """Those that work on a run, by a word of their environment, and of their command line."""
    found = []
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if place.name.isdigit() and f"{TOKEN}={folder}\0".encode() in (place / "environ").read_bytes():
                state = (place / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and word.encode() in (place / "cmdline").read_bytes():
                    found.append(int(place.name))
    return sorted(found)


def hit_from_outside(
    process: Any, layout: str, folder: Path, act: str, after: float, draw: random.Random
) -> tuple[str, int | None]:
    """Send one process the signal of ``act``, ``after`` seconds from now: what was done, and to which one."""
    until = time.monotonic() + after
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    ranks = [pid for pid in processes(folder, "as rank") if LAYOUTS[layout] == 1 or pid != process.pid]
    targets = [process.pid] if act == "launcher" else ranks
    if process.poll() is not None or not targets:
        return "none: ended before" if process.poll() is not None else "none: not yet begun", None
    victim = draw.choice(targets)
    if act == "connections":
        close_connections(victim)
    else:
        os.kill(victim, signal.SIGSTOP if act == "SIGSTOP" else signal.SIGKILL)
    if act == "SIGSTOP" and LAYOUTS[layout] == 1:  # it holds the directory as long as it lives
        second = started(layout, folder, resume=True)
        code = ended(second)
        said = " ".join(log_of(folder).read_text().split())
        os.kill(victim, signal.SIGKILL)
        if RunFolder(folder).holds_run and (code != 2 or f"is in use by process {victim} on" not in said):
            return f"wrong: a second process ended with {code}", victim
    return f"process {1 + targets.index(victim)} of {len(targets)} after {after:.1f} s", victim


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


def ended(process: Any, patience: float = PATIENCE) -> int | None:
    """Its exit code, None for a hang."""
    try:
        return int(process.wait(patience))
    except subprocess.TimeoutExpired:
        return None


def cleared(folder: Path) -> int:
    """How many processes of a run were left when those that wait for others had time to notice; they are killed."""
    until = time.monotonic() + TIMEOUT + 30
    while (left := processes(folder)) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return len(left)


def disturbed(layout: str, act: str, folder: Path, draw: random.Random, known: dict[str, Any]) -> dict[str, Any]:
    """One run that is hit once and continued until it ends: what was done, and what came of it."""
    ranks = LAYOUTS[layout]
    restarts = draw.choice([0, 3]) if ranks > 1 and act != "launcher" else 0
    row: dict[str, Any] = {"layout": layout, "act": act, "restarts": restarts}
    victim = None
    if act == "at a file":
        rank = draw.randrange(ranks)
        kill = [rank, draw.randint(1, known["counts"][rank])]
        row["hit"] = f"rank {rank} at operation {kill[1]} of {known['counts'][rank]}"
        process = started(layout, folder, restarts=restarts, kill=kill)
    else:
        process = started(layout, folder, restarts=restarts)
        after = draw.uniform(0.3, 1.0) * known["seconds"]
        row["hit"], victim = hit_from_outside(process, layout, folder, act, after, draw)
    code = ended(process)
    if code is None and act == "SIGSTOP" and (folder / "result.json").is_file():
        # Only torchrun waits for a rank that was stopped when its work was done, and it waits for ever.
        row["hit"] += ", when its work was done; continued"
        os.kill(victim or 0, signal.SIGCONT)
        code = ended(process)
    row["left"], row["continued"] = cleared(folder), []
    while code != 0 and len(row["continued"]) < 3:
        group = next(group for group in ALIKE if layout in group)
        layout = draw.choice(sorted(group))
        resume = RunFolder(folder).holds_run
        row["continued"].append(layout if resume or layout == "compare" else f"{layout}, anew")
        code = ended(started(layout, folder, resume=resume))
        row["left"] += cleared(folder)
    said = log_of(folder).read_text()
    row["outcome"] = "failed" if code != 0 or row["hit"].startswith("wrong") else differs(folder, known["folder"])
    if row["outcome"] not in RIGHT or row["left"]:
        row["said"] = said[-3000:]
    return row


def differs(folder: Path, whole: Path) -> str:
    """``equal``, or the first thing in which a run differs from the one that was left alone."""
    runs = sorted(path.parent.relative_to(whole) for path in whole.rglob("result.json"))
    for run in runs:
        found, expected = (load_file(place / run / "model.safetensors") for place in (folder, whole))
        if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name]) for name in expected):
            return f"weights of {run}"
        found, expected = (json.loads((place / run / "result.json").read_text()) for place in (folder, whole))
        if any(found[name] != expected[name] for name in ("last", "best", "cuts", "steps")):
            return f"result of {run}"
        rows = [
            list(csv.DictReader((place / run / "metrics.csv").read_text().splitlines())) for place in (folder, whole)
        ]
        for values in rows[0] + rows[1]:
            del values["seconds"]
        if rows[0] != rows[1]:
            return f"metrics of {run}"
    return "equal" if runs else "no run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[tuple[str, str, str]] = Counter()
    known: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as top, asked.out.open("w") as lines:
        for layout, ranks in LAYOUTS.items():
            folder, start = Path(top) / f"alone{len(known)}", time.monotonic()
            assert ended(started(layout, folder)) == 0, log_of(folder).read_text()
            operations = [int(Path(f"{folder}.count{rank}").read_text()) for rank in range(ranks)]
            known[layout] = {"folder": folder, "seconds": time.monotonic() - start, "counts": operations}
        number = 0
        while sum(counts.values()) < asked.number:
            layout = list(LAYOUTS)[number % len(LAYOUTS)]
            acts = ["SIGKILL", "SIGKILL", "at a file", "at a file", "at a file"]
            acts += {"one process": ["SIGSTOP"], "compare": []}.get(layout, ["SIGSTOP", "connections", "launcher"])
            folder = Path(top) / f"run{number}"
            number += 1
            row = disturbed(layout, draw.choice(acts), folder, draw, known[layout])
            shutil.rmtree(folder, ignore_errors=True)
            if row["hit"].startswith("none"):
                continue
            outcome = row["outcome"] if not row["left"] else f"{row['outcome']}, {row['left']} processes left"
            counts[row["layout"], row["act"], outcome] += 1
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            if outcome not in RIGHT:
                print(json.dumps(row, indent=1), file=sys.stderr)
    print("| layout | act | outcome | runs |\n|---|---|---|---|")
    for (layout, act, outcome), count in sorted(counts.items()):
        print(f"| {layout} | {act} | {outcome} | {count} |")
    return int(any(outcome not in RIGHT for _, _, outcome in counts))


if __name__ == "__main__":
    sys.exit(as_rank() if sys.argv[1:2] == ["as rank"] else main())
