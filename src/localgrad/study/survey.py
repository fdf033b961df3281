"""Does it hold for every model of a library? One row for each, see `localgrad.study.examination`.

Each model runs in a process of its own, with a time limit, so that a crash or a hang is a row and not the end.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from localgrad import models
from localgrad.errors import ConfigError
from localgrad.named import imported
from localgrad.study.examination import CHECKS, NUM_CLASSES, Candidate, Row, classifier, examine, new_row
from localgrad.study.rows import add_row, read_rows

Candidates = Mapping[str, Callable[[], Candidate]]

# Whose versions a row notes, as far as they are installed.
PACKAGES = ("torch", "torchvision", "timm", "transformers", "peft", "diffusers", "monai", "segmentation_models_pytorch")


def select(library: str, pattern: str = "*", *, every: bool = False, cache: Path | None = None) -> dict[str, str]:
    """Names of models, without the library's prefix -> the family each stands for.

    Args:
        library: ``torchvision`` (each model is its own family), ``timm`` (a family is one of its modules; the
            classifier with fewest parameters stands for it, those that timm made for its own tests left out), or
            ``module:name`` of a mapping from names to functions that return a `Candidate` (each its own family).
        pattern: shell pattern that names must match.
        every: all variants of timm's families.
        cache: a JSON file that remembers the answer, since counting parameters takes minutes.

    Raises:
        ConfigError: the library is unknown or not installed, or no name matches.
    """
    own = ":" in library
    known = list(candidates(library)) if own else [name.partition(":")[2] for name in models.available(library)]
    names = [name for name in known if fnmatch.fnmatch(name, pattern)]
    if not names:
        where = f"it has {', '.join(known)}" if own else f"see localgrad list models {library}"
        raise ConfigError(f"no model of {library} is called like {pattern!r}; {where}")
    if library != "timm":
        return {name: name for name in names}
    import timm

    families: dict[str, list[str]] = {}
    for family in timm.list_modules():
        members = set(timm.list_models(module=family))
        found = [name for name in names if name in members]
        if chosen := found if every else [name for name in found if not name.startswith("test_")] or found:
            families[family] = chosen
    if every:
        return {name: family for family, chosen in families.items() for name in chosen}
    asked = {"timm": timm.__version__, "pattern": pattern}
    if cache is not None and cache.exists() and (counted := json.loads(cache.read_text())).items() >= asked.items():
        return dict(counted["models"])
    selection = {
        min(chosen, key=_parameters) if len(chosen) > 1 else chosen[0]: family for family, chosen in families.items()
    }
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(asked | {"models": selection}, indent=2) + "\n")
    return selection


def candidates(source: str) -> Candidates:
    """The mapping that ``module:name`` says.

    Raises:
        ConfigError: there is no such module or name, or it is no mapping.
    """
    found = imported(source, "mapping of candidates")
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{source!r} is a {type(found).__name__}; it must map names to functions that return candidates"
        )
    return found


def _parameters(name: str) -> tuple[bool, float]:
    """Whether one of timm's models has no classifier, and its parameters; infinite if it needs memory to be built."""
    import timm

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = [p.shape for p in timm.create_model(name, num_classes=NUM_CLASSES).parameters()]
            return all(shape[:1] != (NUM_CLASSES,) for shape in shapes), sum(shape.numel() for shape in shapes)
    except Exception:  # a constructor may fail in any way on the meta device
        return False, float("inf")


def examine_library(library: str, name: str) -> Row:
    """The row of one model of ``timm``, ``torchvision`` or ``module:name``, random weights, on one CPU thread."""
    torch.set_num_threads(1)
    full = named(library, name)

    def build(size: int | None) -> nn.Module:
        return models.create(full, num_classes=NUM_CLASSES, image_size=size)

    row = examine(full, lambda: candidates(library)[name] if ":" in library else classifier(build))
    return row | {"versions": dict(_versions())}


def named(library: str, name: str) -> str:
    """What a model is called in its row: ``timm:resnet18``, ``reach:bert`` for one of ``tests.reach:REACH``."""
    return f"{library.partition(':')[0].rpartition('.')[2]}:{name}"


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


def survey(
    library: str,
    selection: Mapping[str, str],
    out: Path,
    *,
    workers: int = 2,
    timeout: float = 600.0,
) -> Iterator[tuple[Row, bool]]:
    """The row of each selected model, those in the file first, and whether it is new; new ones are appended to it.

    Models whose rows in the file say that something failed run again.

    Args:
        library: ``timm``, ``torchvision`` or ``module:name``; ``selection`` from `select`.
        out: a JSON-lines file, made if it is not there.
        workers: processes at a time.
        timeout: of one model, in seconds.
    """
    known = {name: row for name, row in read_rows(out, "model").items() if row["ok"]}
    jobs = {}
    for name, family in selection.items():
        if (row := known.get(named(library, name))) is not None:
            yield row, False
        else:
            jobs[named(library, name)] = (partial(examine_library, library, name), family)
    out.parent.mkdir(parents=True, exist_ok=True)
    imported = () if ":" in library else (library,)
    for row in in_processes({name: job for name, (job, _) in jobs.items()}, workers, timeout, imported):
        row["family"] = jobs[row["model"]][1]
        add_row(out, row)
        yield row, True


def in_processes(
    jobs: Mapping[str, Callable[[], Row]], workers: int, timeout: float, preload: Iterable[str] = ()
) -> Iterator[Row]:
    """What each job returns, as it ends; each has a process of its own.

    A job that takes longer than ``timeout`` seconds or whose process dies gives a row that says so. ``preload`` names
    modules to import once for all of them.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__, *preload])
    running: set[BaseProcess] = set()
    pool = ThreadPoolExecutor(workers)  # a thread waits for each process
    try:
        rows = [pool.submit(_alone, context, running, name, job, timeout) for name, job in jobs.items()]
        for row in as_completed(rows):
            yield row.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.kill()


def _alone(context: Any, running: set[BaseProcess], name: str, job: Callable[[], Row], timeout: float) -> Row:
    """What a job returns in a process of its own, which is among ``running`` meanwhile."""
    started = time.monotonic()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(job, theirs), daemon=True)
    process.start()
    running.add(process)
    theirs.close()
    try:
        if ours.poll(timeout):
            row: Row = ours.recv()
            return row
        reason = f"it took longer than {timeout:g} s; call survey() with a longer timeout"
    except EOFError:
        process.join()
        reason = f"its process ended with code {process.exitcode}"
        reason += "; it was killed, most likely for memory: call it with fewer workers" * (process.exitcode == -9)
    finally:
        process.kill()
        process.join()
        running.discard(process)
        ours.close()
    seconds = time.monotonic() - started
    return new_row(name) | {"reasons": {"process": reason}, "seconds": round(seconds, 1)}


def _send(job: Callable[[], Row], connection: Connection) -> None:
    connection.send(job())


def table(rows: Iterable[Row]) -> Table:
    """One line for each row."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("model", overflow="fold")
    for heading in ("px", "cuts", "cut", "eval", "grad", "isol.", "dgl", "loss", "man++", "s"):
        made.add_column(heading, justify="right")
    for row in rows:
        refused = row.get("refused", {})
        marks = ("ref." if w in refused else {True: "yes", False: "NO", None: "-"}[row["checks"][w]] for w in CHECKS)
        sizes = (str(row.get(key, "-")) for key in ("image_size", "cut_points"))
        made.add_row(row["model"].partition(":")[2] or row["model"], *sizes, *marks, f"{row['seconds']:.0f}")
    return made


def failures(rows: Iterable[Row]) -> Iterator[str]:
    """One line for each check that failed and each method that is refused: model, check and reason."""
    for row in rows:
        for what, reason in row["reasons"].items():
            yield f"{row['model']}: {what}: {reason}"
        for what, reason in row.get("refused", {}).items():
            yield f"{row['model']}: {what} refused: {reason}"
