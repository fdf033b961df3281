"""Random command lines and recipes, drawn from the commands' own lists of options.

python bench/command_lines.py --number 1000 --out results/reliability-2026-11-28/command-lines.jsonl

Each runs in a process of its own. Right is: exit code 0, or 2 for a mistake; no traceback; a refusal within 20 s and
below 1 GB. What is still at work after 20 s and has said something is stopped, and counts as accepted. The exit code is
1 if anything else happened.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from command import exit_code

PATIENCE, MOST_BYTES = 20.0, 10**9
RIGHT = ("accepted", "refused", "at work")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["localgrad.train.run", "localgrad.planning", "localgrad.study.compare"])
VALUES = [
    "0", "1", "2", "-1", "3.5", "nan", "inf", "-inf", "1e-300", "1e400", "2**31", str(2**31), str(10**20), "true",
    "yes", "null", "", " ", "[]", "{}", "[1, 2]", "{a: 1}", "dgl", "dgl+man", "[dgl, man]", "[{dgl: {head: linear}}]",
    "e2e", "[[[[[[[[dgl]]]]]]]]", "&a [*a]", "[&a [x, x], *a]", "!!int abc", "!!python/object/apply:os.system [ls]",
    "2024-99-99", "resnet8", "resnet32", "timm:resnet18", "torchvision:resnet18", "digits", "cifar10", "folder:none",
    "masks:.", ".", "/", "~nobody", "none.yaml", "é\u202e", "a=b", "=", "train.epochs=1", "cpu", "cuda:7", "bf16",
    "1GiB", "0B", "-5MiB", "1e", "x" * 5000, "[" * 300, "../../etc/passwd", "os:system",
    "localgrad.models:resnet8", "block=2", "data=0",
]  # fmt: skip
SMALL = ["train.epochs=1", "data.limit=60", "train.threads=1"]


def drawn(draw: random.Random) -> list[str]:
    """One command line: a few options with odd values, after words that would make sense."""
    import typer

    from localgrad import cli
    from localgrad.config import Config

    def settings(kind: Any, prefix: str = "") -> list[str]:
        found = []
        for part in dataclasses.fields(kind):
            inner = part.default_factory() if part.default_factory is not dataclasses.MISSING else part.default
            found += (
                settings(type(inner), f"{prefix}{part.name}.")
                if dataclasses.is_dataclass(inner)
                else [prefix + part.name]
            )
        return found

    commands: Any = typer.main.get_command(cli.app)
    name = draw.choice([*commands.commands, "train", "train", "compare"])
    command = commands.commands[name]
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("-")]
    words = [name]
    if name in ("train", "compare", "summary"):
        words += draw.choice([["digits", *SMALL], ["digits", *SMALL], [draw.choice(VALUES)], []])
    elif name == "survey":
        words += [draw.choice(["timm", "torchvision", "tests", draw.choice(VALUES)]), "--filter", "no-such-*"]
    else:
        words += draw.choice([["resnet8"], [draw.choice(VALUES)], []])
    for _ in range(draw.randint(0, 3)):
        kind = draw.random()
        if kind < 0.45 and options:
            option = draw.choice(options)
            words += draw.choice([[option, draw.choice(VALUES)], [f"{option}={draw.choice(VALUES)}"], [option]])
        elif kind < 0.9 and name in ("train", "compare", "summary"):
            words.append(f"{draw.choice(settings(Config))}={draw.choice(VALUES)}")
        else:
            words.append(draw.choice(VALUES))
    return words


def command_in(words: list[str], folder: str) -> None:
    """A command in this process, whose answer is left in ``folder``."""
    os.chdir(folder)
    code = exit_code(words, Path("said"))
    Path("end").write_text(json.dumps([code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
    os._exit(0)


def tried(words: list[str]) -> dict[str, Any]:
    """What one command line came to."""
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=command_in, args=(words, folder))
        started = time.monotonic()
        process.start()
        process.join(PATIENCE)
        late = process.is_alive()
        process.kill()
        process.join()
        row: dict[str, Any] = {"words": [word[:200] for word in words], "seconds": round(time.monotonic() - started, 1)}
        said = (Path(folder) / "said").read_text() if (Path(folder) / "said").exists() else ""
        if late:
            # It has begun to train, measure or draw, or it hangs before it has said a word.
            row["outcome"] = "at work" if said.strip() else "hang"
        elif not (Path(folder) / "end").exists():
            row["outcome"] = f"died ({process.exitcode})"
        else:
            code, row["bytes"] = json.loads((Path(folder) / "end").read_text())
            row["outcome"] = {0: "accepted", 2: "refused"}.get(code, f"exit code {code}")
            if "Traceback" in said:
                row["outcome"] = "traceback"
            elif code == 2 and row["bytes"] > MOST_BYTES:
                row["outcome"] = "refused too late"
        if row["outcome"] not in RIGHT:
            row["said"] = said[-1500:]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with asked.out.open("w") as lines:
        for _ in range(asked.number):
            row = tried(drawn(draw))
            counts[row["outcome"]] += 1
            if row["outcome"] not in RIGHT:
                print(json.dumps(row, indent=1), file=sys.stderr)
            lines.write(json.dumps(row) + "\n")
            lines.flush()
    print(", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items())))
    return int(bool(set(counts) - set(RIGHT)))


if __name__ == "__main__":
    sys.exit(main())
