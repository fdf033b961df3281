"""Damages files of run directories at random, and asks what a command then makes of the run.

python bench/mutations.py --number 300 --ranks 1 --out results/reliability-2026-11-28/one-process.jsonl
python bench/mutations.py --number 120 --ranks 2 --out results/reliability-2026-11-28/two-ranks.jsonl

Each line is one mutation of one file, of a run that was stopped or has ended, and one command: a resumption, an
evaluation, a prediction. It may end as ``recovered`` (the very answer of the undamaged run), ``older`` (evaluates the
checkpoint before, with a warning that names the damage) or ``refused`` (exit code 2, one paragraph that names the file,
or the folder it lies in). Everything else is a fault, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from command import exit_code

PATIENCE = 90.0
STOPPED = 5
RIGHT = ("recovered", "older", "refused")
RUN = ["train", "digits", "beside=[]", "data.limit=120", "train.batch_size=32", "train.threads=1", "--epochs", "3"]
RUN += ["train.checkpoint_every=2", "--model", "resnet8", "--num-blocks", "4"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed.checkpoint", "localgrad.train.parallel", "localgrad.cli.train"])


def command_in(rank: int, ranks: int, port: int, words: list[str], said: str, stop: int | None) -> None:
    """A command in this process, as one of ``ranks``; what it prints goes to the file ``said``."""
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    from localgrad.train.folder import RunFolder

    if stop is not None:
        save = RunFolder.save

        def last(folder: RunFolder, run: Any) -> None:
            save(folder, run)
            if run.step >= stop:
                os._exit(0)

        RunFolder.save = last
    os._exit(exit_code(words, Path(said)))


def called(words: list[str], ranks: int, stop: int | None = None) -> tuple[int | None, str]:
    """Exit code, None for a hang, and what was said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = [
            CONTEXT.Process(target=command_in, args=(rank, ranks, port, words, str(files[rank]), stop))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        until = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        hangs = any(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
            process.join()
        text = "\n".join(file.read_text() for file in files if file.exists())
    codes = [process.exitcode for process in processes]
    return (None if hangs else max((code or 0 for code in codes), key=abs)), text


def damaged(path: Path, draw: random.Random) -> str:
    """Change one file, and say how."""
    data = path.read_bytes()
    kind = draw.choice(["bit", "bit", "byte", "cut", "empty", "gone", "grown", "doubled", "zeros", "swapped", "folder"])
    at = draw.randrange(max(1, len(data)))
    new: bytes | None = data
    if kind == "bit" and data:
        new = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    elif kind == "byte" and data:
        new = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    elif kind == "cut":
        new = data[:at]
    elif kind == "empty":
        new = b""
    elif kind == "grown":
        new = data + draw.randbytes(draw.randint(1, 50))
    elif kind == "doubled":
        new = data[:at] + data[at : at + 64] + data[at:]
    elif kind == "zeros":
        new = data[:at] + bytes(min(512, len(data) - at)) + data[at + 512 :]
    elif kind == "swapped":
        half = len(data) // 2
        new = data[half:] + data[:half]
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(new)
    return f"{kind} at {at} of {len(data)}"


def answer(run: Path, said: str, words: list[str]) -> Any:
    """What a command came to, to compare: weights, scores and metrics, or what it printed."""
    if words[0] != "train":
        return said[min(said.index(start) for start in ("{", "[") if start in said) :]  # JSON, behind any warning
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    kept = [k for k, name in enumerate(rows[0]) if name != "seconds" and "train/" not in name]
    result = json.loads((run / "result.json").read_text())
    weights = {name: value.tolist() for name, value in load_file(run / "model.safetensors").items()}
    return weights, {name: result[name] for name in ("last", "best", "cuts")}, [[row[k] for k in kept] for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    layout = ["--parallel", f"block={asked.ranks},timeout=30"] if asked.ranks > 1 else []
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as top:
        begun, ended, run = Path(top) / "begun", Path(top) / "ended", Path(top) / "run"
        code, said = called([*RUN, "--run-dir", str(begun), *layout], asked.ranks, STOPPED)
        assert code == 0, said
        shutil.copytree(begun, ended)
        code, said = called(["train", "--resume", str(ended), *layout], asked.ranks)
        assert code == 0, said
        picture = write_picture(Path(top))
        whole: dict[str, Any] = {}

        def words_of(kind: str) -> list[str]:
            return {
                "resume": ["train", "--resume", str(run), *layout],
                "eval": ["eval", str(run), "--json"],
                "best": ["eval", str(run), "--best", "--json"],
                "predict": ["predict", str(run), str(picture), "--json"],
            }[kind]

        with asked.out.open("w") as lines:
            for number in range(-4, asked.number):  # the first four change nothing: what an undamaged run answers
                kind = (
                    ["resume", "eval", "best", "predict"][number + 4]
                    if number < 0
                    else draw.choice(["resume", "resume", "eval", "best", "predict"])
                )
                source = begun if kind == "resume" and (number < 0 or draw.random() < 0.7) else ended
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(source, run)
                row: dict[str, Any] = {"command": kind, "run": source.name}
                file = None
                if number >= 0:
                    files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
                    file = draw.choice(files)
                    row |= {"file": str(file.relative_to(run)), "mutation": damaged(file, draw)}
                words = words_of(kind)
                code, said = called(words, asked.ranks if kind == "resume" else 1)
                if number < 0:
                    assert code == 0, said
                    whole[kind] = answer(run, said, words)
                    continue
                assert file is not None
                row["outcome"] = outcome(code, said, file, run, words, whole[kind])
                if row["outcome"] not in RIGHT:
                    row["said"] = said[-2000:]
                    print(json.dumps(row, indent=1), file=sys.stderr)
                counts[row["outcome"]] += 1
                lines.write(json.dumps(row) + "\n")
                lines.flush()
    print(", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items())))
    return int(bool(set(counts) - set(RIGHT)))


def outcome(code: int | None, said: str, file: Path, run: Path, words: list[str], whole: Any) -> str:
    """What a command made of a damaged ``file``."""
    if code is None:
        return "hang"
    if "Traceback" in said:
        return "traceback"
    told = "".join(said.split())
    named = any(part in told for part in (file.name, file.parent.name))
    if code == 0:
        try:
            if answer(run, said, words) == whole:
                return "recovered"
        except (OSError, ValueError, LookupError):
            return "silent"
        return "older" if words[0] == "eval" and named and "continuingfromstep" in told else "silent"
    return "refused" if code == 2 and "error:" in said and named else "unnamed"


def write_picture(folder: Path) -> Path:
    """A picture to predict."""
    from PIL import Image

    path = folder / "picture.png"
    image = Image.new("L", (8, 8))
    image.putdata([(k * 37) % 256 for k in range(64)])
    image.save(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
