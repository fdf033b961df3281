"""Many methods on one task with equal data, seeds, data order and epochs, and what their steps cost, measured in turn.

A run is known by what decides its outcome, so a comparison may be stopped, continued, extended, and worked on by
several processes at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_map_only

from localgrad.config import BlocksConfig, Config, OptimConfig, validate
from localgrad.costs import cost_of
from localgrad.engine import local_losses
from localgrad.errors import ConfigError, TrainingError
from localgrad.measure.memory import held_bytes
from localgrad.measure.process_memory import peak_growth, storages_mapped
from localgrad.measure.timing import clock_of, in_turns
from localgrad.network import LocalNetwork, exchange
from localgrad.randomness import keyed_randomness
from localgrad.recipes import merge, override
from localgrad.sealed import write
from localgrad.spec import MethodSpec, described, parse_method, plain
from localgrad.study.rows import add_row, read_rows
from localgrad.train.experiment import DTYPES, FREE, build_network, build_task, load_data, set_up_torch
from localgrad.train.folder import RunFolder
from localgrad.train.optim import Stepper
from localgrad.train.run import run
from localgrad.version import __version__

ROWS, COSTS, RUNS = "rows.jsonl", "costs.json", "runs"
PARTS, ROUNDS = 4, 7  # micro-batches of accumulation, timed steps of each method
REFERENCE: MethodSpec = ["e2e"]
RECOMPUTED = "checkpointing"
OWN = ("train.compile", "train.capture", "train.channels_last", "train.precision")  # of one contestant, beside optim.*

Settings = dict[str, Any]


def identity(config: Config) -> Settings:
    """What decides the outcome of a run, ready for JSON: every setting but those that may change in mid-run."""
    settings: Settings = json.loads(json.dumps(dataclasses.asdict(config)))
    for path in FREE:
        section, _, name = path.rpartition(".")
        del (settings[section] if section else settings)[name]
    settings["method"] = plain(config.method)
    return settings


def _name(part: str | dict[str, dict[str, Any] | None]) -> str:
    return part if isinstance(part, str) else next(iter(part))


def trained_as(settings: Settings) -> Settings:
    """The settings of the run that yields the same weights, bit for bit, and is trained in place of these.

    Recomputation changes no gradient, so it is left out; without it, where end-to-end training is cut changes nothing.
    Nor does when a parameter steps, once its gradient is there.
    """
    if settings["optim"].get("in_backward"):
        settings = {**settings, "optim": {**settings["optim"], "in_backward": False}}
    method = [part for part in settings["method"] if _name(part) != RECOMPUTED]
    blocks = dataclasses.asdict(BlocksConfig(num_blocks=1)) if method[:1] == REFERENCE else settings["blocks"]
    return {**settings, "method": method, "blocks": blocks}


def without(settings: Settings, *names: str) -> Settings:
    """The settings but for some of ``train``."""
    return {**settings, "train": {k: v for k, v in settings["train"].items() if k not in names}}


def costing(settings: Settings) -> Settings:
    """What decides the cost of a step: seed and epochs do not, nor where end-to-end training is cut if all is kept."""
    recomputes = any(_name(part) == RECOMPUTED for part in settings["method"])
    kept = settings if recomputes else {**trained_as(settings), "optim": settings["optim"]}
    return without(kept, "seed", "epochs")


def key_of(settings: Settings) -> str:
    """A short name for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def as_config(base: Config, settings: Settings) -> Config:
    """The run that ``settings`` describe, with the free settings of ``base``."""
    return dataclasses.replace(
        base,
        method=settings["method"],
        blocks=BlocksConfig(**settings["blocks"]),
        optim=OptimConfig(**settings["optim"]),
        train=dataclasses.replace(base.train, **settings["train"]),
        beside=[],
    )


def contestant(base: Config, text: str) -> Config:
    """``base`` by a method with settings of its own, ``METHOD [SECTION.NAME=VALUE]...``: ``e2e train.compile=true``.

    Raises:
        ConfigError: no such method or setting, or one that changes the data, their order or the number of epochs.
    """
    method, *own = re.split(r"\s+(?=\w+\.[\w.]+=)", text.strip())
    settings = override({"method": parse_method(method)}, own)
    for section in settings.keys() - {"method"}:
        for name in settings[section]:
            if section != "optim" and f"{section}.{name}" not in OWN:
                raise ConfigError(
                    f"-m {text!r}: {section}.{name} is the same for all, as data, order and epochs are; a method's own "
                    f"may be optim.* and {', '.join(OWN)}"
                )
    everything = {**dataclasses.asdict(base), "beside": [], "method": settings.pop("method")}
    return validate(merge(everything, settings), f"-m {text!r}")


def variants(base: Config, contestants: Sequence[Config], num_blocks: Sequence[int], parts: int) -> list[Settings]:
    """The settings of each method for each number of blocks: end-to-end training, with checkpointing and accumulation,
    then ``contestants``; every one once.

    Args:
        contestants: of which only the blocks are not taken.
        num_blocks: K of each; none for the blocks of ``base``.
        parts: micro-batches of accumulation; 1 leaves it out.
    """
    references: list[MethodSpec] = [REFERENCE, [*REFERENCE, RECOMPUTED]]
    if parts > 1:
        references.append([*REFERENCE, {"accumulation": {"parts": parts}}])
    cut = [dataclasses.replace(base.blocks, num_blocks=k, cuts=None) for k in num_blocks] or [base.blocks]
    found: dict[str, Settings] = {}
    for blocks in cut:
        for config in (*(dataclasses.replace(base, method=spec) for spec in references), *contestants):
            method = plain(config.method)
            recomputed = any(_name(part) == RECOMPUTED for part in method)
            place = BlocksConfig(num_blocks=1) if method[:1] == REFERENCE and not recomputed else blocks
            settings = identity(dataclasses.replace(config, method=method, blocks=place, beside=[]))
            found.setdefault(key_of(settings), settings)
    return list(found.values())


def runs_of(base: Config, ways: Iterable[Settings], seeds: Sequence[int]) -> list[Config]:
    """What has to be trained, every run once: all ways of a seed before the next seed."""
    found: dict[str, Config] = {}
    for seed in seeds:
        for way in ways:
            settings = trained_as({**way, "train": {**way["train"], "seed": seed}})
            found.setdefault(key_of(settings), as_config(base, settings))
    return list(found.values())


def _uncut(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name != "blocks"}


def like_another(settings: Settings, other: Settings) -> bool:
    """Whether two ways differ in method, blocks, seed and epochs only."""
    apart = ("method", "blocks")
    mine, theirs = (
        {k: v for k, v in without(one, "seed", "epochs").items() if k not in apart} for one in (settings, other)
    )
    return mine == theirs


def check_compared(contestants: Sequence[Config], ways: Sequence[Settings]) -> None:
    """Raise `ConfigError` for one that is not among ``ways``."""
    for config in contestants:
        if _uncut(identity(config)) not in map(_uncut, ways):
            raise ConfigError(
                f"--equal-time {described(config.method)}: it is not among the methods; give it with -m too, written "
                "alike, with the same settings"
            )


def in_the_same_time(ways: Sequence[Settings], costs: dict[str, Settings], timed: Sequence[Config]) -> list[Settings]:
    """End-to-end training for as many epochs as it does in the time that the epochs of each of ``timed`` take: once
    keeping its activations, once recomputing them in as many blocks.

    A method of 1.3 times the time of a step and 10 epochs stands against 13 epochs of end-to-end training, with a
    learning rate that falls over all 13. Of several with end-to-end training it is the one with the method's settings.
    """
    wanted = [_uncut(identity(config)) for config in timed]
    found = []
    for way in (way for way in ways if _uncut(way) in wanted):
        whole = [one for one in ways if one["method"] == REFERENCE]
        reference = next((one for one in whole if like_another(one, way)), ways[0])
        recomputed = {**reference, "method": [*REFERENCE, RECOMPUTED], "blocks": way["blocks"]}
        for rival in (reference, recomputed):
            if key_of(costing(rival)) in costs:
                epochs = equal_epochs(way, rival, costs)
                found.append({**reference, "train": {**reference["train"], "epochs": epochs}})
    return found


def equal_epochs(way: Settings, rival: Settings, costs: dict[str, Settings]) -> int:
    """Epochs that ``rival`` does in the time in which ``way`` does its own, to the nearest."""
    mine, theirs = (costs[key_of(costing(settings))]["time_ratio"] for settings in (way, rival))
    return max(1, round(way["train"]["epochs"] * mine / theirs))


def read_costs(out: Path) -> dict[str, dict[str, Any]]:
    """What steps were found to cost, by key.

    Raises:
        ConfigError: the file holds something else.
    """
    path = out / COSTS
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it, and costs are measured again") from error


def check_same_task(out: Path, base: Config) -> None:
    """Raise `ConfigError` if the rows in ``out`` are about another model or other data."""
    own = identity(base)
    for row in (*read_rows(out / ROWS, "run").values(), *read_costs(out).values()):
        for section in ("model", "data", "task"):
            theirs = row["settings"][section]
            if theirs != own[section]:
                raise ConfigError(
                    f"{out} compares methods with {section} {theirs}, this command has {own[section]}; give another "
                    "--out"
                )


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process got the lock ``path``, which it then holds; a process that ends, however, lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def train_all(runs: Sequence[Config], out: Path, console: Console, resume_with: str, keep: bool = False) -> int:
    """Train what has no row yet and no other process is at; returns how many runs other processes are still at.

    Rows are added to ``out``; unfinished runs have a directory below it, from which they continue, and finished ones
    too if they are to be kept.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    waiting = {key_of(identity(config)): config for config in runs}
    titles = {key: f"[{number}/{len(runs)}] {label(config)}" for number, (key, config) in enumerate(waiting.items(), 1)}
    while True:
        before = len(waiting)
        for key, config in list(waiting.items()):
            with claimed(out / RUNS / f"{key}.lock") as mine:
                if mine and key not in read_rows(out / ROWS, "run"):
                    row = train_one(config, out / RUNS / key, console, titles[key], resume_with)
                    with FileLock(out / f"{ROWS}.lock"):
                        add_row(out / ROWS, row)
                    if not keep:
                        shutil.rmtree(out / RUNS / key)
                if mine:
                    (out / RUNS / f"{key}.lock").unlink(missing_ok=True)
                    del waiting[key]
        if not waiting or len(waiting) == before:
            return len(waiting)


def label(config: Config) -> str:
    """What progress calls a run."""
    where = f" K={config.blocks.num_blocks}" if config.blocks.num_blocks not in (None, 1) else ""
    return f"{described(config.method)}{where}, seed {config.train.seed}"


def train_one(config: Config, folder: Path, console: Console, title: str, resume_with: str) -> dict[str, Any]:
    """Train one run, from where it was stopped if it was, and return its row; one that diverges has ``failed``."""
    row: dict[str, Any] = {"run": key_of(identity(config)), "settings": identity(config), **circumstances(config)}
    place = RunFolder(folder)
    place.claim(resume=place.holds_run)
    try:
        with contextlib.closing(place):
            experiment, result = run(config, place, console, title, resume_with)
    except TrainingError as error:
        console.print(f"{title} failed: {error}")
        return {**row, "failed": str(error)}
    return {
        **row,
        "score": result["last"]["score"]["model"],
        "split": result["split"],
        "metrics": result["last"]["metrics"],
        "heads": {name: score for name, score in result["last"]["score"].items() if name != "model"},
        "history": experiment.history,
        "steps": result["steps"],
        "blocks": result["blocks"],
        "cuts": result["cuts"],
        "data": result["data"],
        "seconds": round(sum(epoch["seconds"] for epoch in experiment.history), 1),
    }


def processor() -> str:
    """What the system calls the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def circumstances(config: Config) -> dict[str, Any]:
    """Where and with what something was measured."""
    device = set_up_torch(config)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    package = Path(__file__).parents[1]
    command = ["git", "-C", str(package), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "localgrad": __version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


class _Contestant:
    """A way with a network, an optimizer and a batch, and the kinds of steps it consists of."""

    def __init__(self, config: Config, network: LocalNetwork, inputs: Any, targets: Any, steps: int) -> None:
        self.config, self.network, self.inputs, self.targets = config, network, inputs, targets
        self.scaler = torch.amp.GradScaler(network.device.type, enabled=config.train.precision == "fp16")
        self.stepper = Stepper(network, config.optim, self.scaler)
        blocks = network.num_blocks
        counts = Counter(network.method.work(blocks, step) for step in range(steps))
        first: dict[Any, int] = {}
        for step in range(steps):
            first.setdefault(network.method.work(blocks, step), step)
        # The first step of each kind stands for all of them, with its share of the run.
        self.kinds = {step: counts[work] / steps for work, step in first.items()}

    def cost(self) -> dict[str, Any]:
        """Everything but the times, from the second step of each kind: in the first the optimizer makes its state.

        What is compiled is counted before; bytes of its tensors are None, as they cannot be seen.
        """
        costs, peaks = [], []
        for number, share in self.kinds.items():
            self.step(number)
            costs.append((share, cost_of(self.network, partial(self.step, number))[0]))
        if compiled := self.config.train.compile:
            self.network.compile_blocks()
            for number in self.kinds:
                self.step(number)
        for number in self.kinds:
            peaks.append(peak_growth(partial(self.step, number), self.network.device))
        largest = max((cost for _, cost in costs), key=lambda cost: cost.total_bytes)
        return {
            **asdict(largest),
            "activation_bytes": None if compiled else max(cost.activation_bytes for _, cost in costs),
            "total_bytes": None if compiled else largest.total_bytes,
            "peak_bytes": max((peak for peak in peaks if peak is not None), default=None),
            "state_bytes": held_bytes([one.state_dict() for one in self.stepper.optimizers], self.network.device),
            "flops": sum(share * cost.flops for share, cost in costs),
            "blocks": self.network.num_blocks,
            "cuts": [cut.name for cut in self.network.cuts],
        }

    def step(self, number: int) -> None:
        """A whole training step, after which there are no gradients."""
        with keyed_randomness(self.config.train.seed):
            for _, loss in local_losses(
                self.network, self.inputs, self.targets, number,
                autocast=DTYPES[self.config.train.precision], on_block_done=self.stepper.block_done,
            ):  # fmt: skip
                self.scaler.scale(loss).backward()
            self.stepper.finish(number)
        exchange(self.network)


def measure_costs(
    base: Config, ways: Sequence[Settings], rounds: int, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """What a training step of each way costs, by key: forward, backward, optimizer and exchange on the first batch.

    Ways take turns, so that a machine that slows down slows all of them. Steps that differ, as those of periodic
    methods do, are measured once of each kind and weighted by how often a run has them; bytes are those of the largest.

    Args:
        ways: the first is the one that times are compared with.
        rounds: timed steps of each kind.

    Raises:
        ConfigError, DataError, PartitionError, MethodError: what is wrong with a way.
    """
    device = set_up_torch(base)
    loaded = load_data(base, device)
    inputs, targets = next(iter(loaded.train.epoch(0)))
    inputs, targets = tree_map_only(Tensor, lambda t: t.to(device), (inputs, targets))
    contestants, found = [], []
    with storages_mapped():
        for way in ways:
            config = as_config(base, way)
            progress(f"memory of {described(config.method)}")
            task = build_task(config, loaded.num_classes, loaded.mean, loaded.std, loaded.kind, loaded.classes)
            network = build_network(config, task, loaded.input_shape, device)
            laid_out = inputs
            if config.train.channels_last:
                laid_out = inputs.contiguous(memory_format=torch.channels_last)
            steps = len(loaded.train) * config.train.epochs
            contestants.append(_Contestant(config, network, laid_out, targets, steps))
            found.append(contestants[-1].cost())
    clock, named = clock_of(device)
    kinds = [partial(contestant.step, number) for contestant in contestants for number in contestant.kinds]
    timed = iter(in_turns(kinds, rounds, device, clock=clock, progress=progress))
    rows = []
    for contestant in contestants:
        taken = [[share * seconds for seconds in next(timed)] for share in contestant.kinds.values()]
        rows.append([math.fsum(turn) for turn in zip(*taken, strict=True)])
    where = circumstances(base)
    result = {}
    for way, cost, seconds in zip(ways, found, rows, strict=True):
        result[key_of(costing(way))] = {
            "settings": costing(way),
            **cost,
            "seconds": statistics.median(seconds),
            "time_ratio": statistics.median(a / b for a, b in zip(seconds, rows[0], strict=True)),
            "clock": named,
            "rounds": rounds,
            **where,
        }
    return result


def update_costs(
    base: Config, ways: Sequence[Settings], out: Path, rounds: int, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """`measure_costs` of the ways that the file of ``out`` lacks, beside end-to-end training; one process at a time."""
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / f"{COSTS}.lock"):
        costs = read_costs(out)
        reference = ways[0]
        missing = {key_of(costing(way)): way for way in ways if key_of(costing(way)) not in costs}
        if missing:
            compared = [reference, *(way for way in missing.values() if costing(way) != costing(reference))]
            costs = {**measure_costs(base, compared, rounds, progress), **costs}
            order = {key: costs[key] for key in (*read_costs(out), *costs)}
            write(out / COSTS, json.dumps(order, indent=1) + "\n")
            costs = order
    return costs


def compare(
    base: Config,
    out: Path,
    console: Console,
    *,
    methods: Sequence[str],
    num_blocks: Sequence[int],
    seeds: Sequence[int],
    equal_time: Sequence[str],
    keep: bool = False,
    parts: int = PARTS,
    rounds: int = ROUNDS,
) -> None:
    """Measure costs and train what is missing in ``out``; methods are written as on the command line."""
    beside = [dataclasses.replace(base, method=spec) for spec in (base.method, *base.beside)]
    ways = variants(base, [contestant(base, text) for text in methods] or beside, num_blocks, parts)
    rivals = [contestant(base, text) for text in equal_time]
    check_compared(rivals, ways)
    check_same_task(out, base)
    costs = update_costs(base, ways, out, rounds, lambda what: console.print(what, style="dim"))
    longer = in_the_same_time(ways, costs, rivals)
    runs = runs_of(base, [*ways, *longer], seeds or [base.train.seed])
    if left := train_all(runs, out, console, "the same command", keep):
        console.print(f"{left} more runs: other processes are at them")
