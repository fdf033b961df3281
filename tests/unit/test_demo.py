"""`localgrad demo` and the progress of a run: rows, bytes against independent counts, and what is printed."""

from __future__ import annotations

import copy
import dataclasses
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import localgrad
from localgrad.cli.options import settings_of
from localgrad.measure.memory import LiveBytes
from localgrad.study.contest_report import thinned
from localgrad.study.demo import BATCH, PARTS, PICTURE, Line, demo, ways_of
from localgrad.train.progress import Progress

DEPTH = 3
SIZES = [f"model.options.depth={DEPTH}", "model.options.width=32", f"blocks.num_blocks={DEPTH}", "train.epochs=1",
         "train.batch_size=16", "data.limit=48"]  # fmt: skip
LOCAL = [f"local{more}" for more in ("", f" x{PARTS}", f" x{PARTS}, one block")]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Line], Path]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return demo(settings_of("demo", SIZES), out, Console(file=io.StringIO())), out


def network() -> localgrad.network.LocalNetwork:
    model = localgrad.models.vit8(10, 1, depth=DEPTH, width=32, patch=2)
    method = localgrad.methods.dgl(localgrad.tasks.classification(10), head="linear")
    return localgrad.localize(model, method, DEPTH, example=torch.randn(2, 1, 8, 8)).train()


def test_rows_and_files(shown: tuple[list[Line], Path]) -> None:
    lines, out = shown
    exact = ["end-to-end", "checkpointing", f"accumulation x{PARTS}", f"checkpointing x{PARTS}"]
    assert [line.row.name for line in lines] == exact + LOCAL
    assert [line.row.gradients for line in lines] == ["exact"] * 4 + ["local"] * 3
    assert [line.row.name for line in lines if line.trained] == ["end-to-end", "local"]
    assert len({line.score for line in lines[:4]}) == len({line.score for line in lines[4:]}) == 1
    assert (out / PICTURE).stat().st_size > 10_000 and (out / "demo.json").is_file()
    assert {run.name for run in out.iterdir() if run.is_dir()} == {"end-to-end", "local"}


@given(st.lists(st.integers(0, 99), min_size=1, max_size=50), st.integers(1, 20))
def test_a_thinned_timeline_keeps_the_peak_and_the_end(alive: list[int], count: int) -> None:
    timeline = tuple((0.5 * (k + 1), live, live // 2, live // 3) for k, live in enumerate(alive))
    kept = thinned(timeline, count)
    assert len(kept) <= count + 1 and kept[-1] == (100.0, *timeline[-1][1:])
    assert {row[1:] for row in kept} <= {row[1:] for row in timeline}
    assert max(live for _, live, *_ in kept) == max(alive)


def test_bytes_are_those_of_independent_counts(shown: tuple[list[Line], Path]) -> None:
    rows = {line.row.name: line.row for line in shown[0]}
    local = network()
    for name, trained in (("end-to-end", local.model), ("local", local), (LOCAL[1], local)):
        parameters = list(trained.parameters())
        assert rows[name].weight_bytes == sum(4 * p.numel() for p in parameters)
        assert rows[name].state_bytes == sum(2 * 4 * p.numel() + 4 for p in parameters)  # two moments, one counter
    resident = rows[LOCAL[2]]
    assert resident.weight_bytes == resident.state_bytes == 0  # nothing stays
    assert resident.activation_bytes == rows[LOCAL[1]].activation_bytes
    assert max(live for _, live, *_ in resident.timeline) == resident.memory == resident.total_bytes
    largest = max(sum(4 * p.numel() for p in local.block_parameters(k)) for k in range(DEPTH))
    assert 3 * largest < max(visiting for *_, visiting in resident.timeline) <= 2 * (3 * largest)  # and the next one
    names = ("end-to-end", "local", *LOCAL[1:])
    assert sorted(names, key=lambda name: -(rows[name].memory or 0)) == list(names)


def test_bytes_of_a_resident_step_are_those_of_a_literal_loop(shown: tuple[list[Line], Path]) -> None:
    resident = shown[0][-1].row
    local = network()
    local.method = localgrad.methods.accumulation(local.method, parts=PARTS)
    localgrad.resident(local, "cpu")
    optimizers = [torch.optim.AdamW(local.block_parameters(k), 1e-3, weight_decay=0.0) for k in range(DEPTH)]
    x, y = torch.randn(BATCH, 1, 8, 8), torch.randint(10, (BATCH,))

    def update(k: int) -> None:
        optimizers[k].step()
        optimizers[k].zero_grad(set_to_none=True)

    for _ in range(2):
        with LiveBytes(local.parameters()) as live:
            for _, loss in localgrad.local_losses(local, x, y, on_block_done=update):
                loss.backward()
    assert resident.total_bytes == live.peak


def test_micro_batches_and_residence_come_to_the_same_weights() -> None:
    """What the table says of the rows that it does not train."""
    from localgrad.study.contest import _Contestant

    config = settings_of("demo", SIZES)
    task = localgrad.tasks.classification(10)
    torch.manual_seed(0)
    model = localgrad.models.vit8(10, 1, depth=DEPTH, width=32, patch=2).double()
    x, y = torch.randn(BATCH, 1, 8, 8, dtype=torch.float64), torch.randint(10, (BATCH,))
    found = {}
    for way in ways_of(config, task):
        torch.manual_seed(1)
        contestant = _Contestant(dataclasses.replace(way, optimizer="SGD"), copy.deepcopy(model), x, y, "count")
        contestant.step()
        found[way.name] = [p.detach().clone() for p in contestant.network.model.parameters()]
    for name, weights in found.items():
        same = found["local" if name.startswith("local") else "end-to-end"]
        for mine, theirs in zip(weights, same, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert any((a != b).any() for a, b in zip(found["local"], found["end-to-end"], strict=True))


@pytest.mark.parametrize("terminal", [False, True])
def test_an_epoch_line_tells_blocks_memory_and_time_left(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, color_system=None)
    scores = {f"block {k}": 0.5 + k / 100 for k in range(1, 8)} | {"model": 0.6}
    read = {"loss": {"block 1": 2.0, "model": 1.0}, "score": {"block 1": 0.5, "model": 0.6}}
    run = SimpleNamespace(
        epoch=0, batch=2, step=2, config=SimpleNamespace(train=SimpleNamespace(epochs=3)),
        data=SimpleNamespace(train=range(4)), network=SimpleNamespace(device=torch.device("cpu")),
        meter=SimpleNamespace(read=lambda: read),
        history=[{"epoch": 1, "train": {"loss": {"model": 1.0}}, "validation": {"score": scores}}],
    )  # fmt: skip
    with Progress(console, "dgl") as progress:
        progress.began -= 20  # two steps in 20 seconds
        progress.step(run)
        progress.step(run)
        progress.epoch(run)
        run.step, run.history[0]["epoch"] = 12, 3
        progress.epoch(run)
    text = file.getvalue()
    memory = r"(  peak [\d.]+ [MG]iB)?"
    line = r"dgl {}/3  loss 1.000  validation blocks 51 52 .. 56 57 model 60.0 %" + memory
    assert re.search(line.format(1) + r"  0:01:4\d left\n", text)
    assert re.search(line.format(3) + r"\n", text)  # nothing is left
    assert ("batch 2/4" in text) == terminal
