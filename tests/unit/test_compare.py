"""Comparisons: what identifies a run, resuming, sharing, the same data for all; costs against literal loops."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import localgrad
from localgrad import ConfigError
from localgrad.config import Config, validate
from localgrad.costs import cost
from localgrad.study import compare, compare_report
from localgrad.study.rows import add_row, read_rows
from localgrad.train import run as run_module
from localgrad.train.experiment import build
from localgrad.train.run import Interrupted

QUIET = Console(quiet=True)
SETTINGS: dict[str, Any] = {
    "method": ["dgl"],
    "model": {"name": "resnet8"},
    "data": {"name": "digits", "augment": False, "limit": 160},
    "blocks": {"num_blocks": 3},
    "train": {"epochs": 2, "batch_size": 48, "eval_batch_size": 400, "threads": 1},
}
BASE = validate(SETTINGS, "test")
COMPARED: dict[str, Any] = {
    "num_blocks": [3],
    "seeds": [],
    "parts": 1,
    "equal_time": [],
    "rounds": 1,
    "keep": False,
}


def trained(config: Config, out: Path) -> dict[str, Any]:
    compare.train_all([config], out, QUIET, "it")
    return read_rows(out / compare.ROWS, "run")[compare.key_of(compare.identity(config))]


def outcome(row: dict[str, Any]) -> dict[str, Any]:
    """What must be equal, bit for bit; JSON keeps every digit."""
    history = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in row["history"]]
    return {"history": history, **{name: row[name] for name in ("score", "heads", "steps", "cuts")}}


def with_method(method: list[Any], num_blocks: int = 3, **train: Any) -> Config:
    settings = {"method": method, "blocks": {"num_blocks": num_blocks}, "train": {**SETTINGS["train"], **train}}
    return validate({**SETTINGS, **settings}, "test")


def own(*texts: str) -> list[Config]:
    return [compare.contestant(BASE, text) for text in texts]


@pytest.fixture(scope="module")
def dgl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(BASE, tmp_path_factory.mktemp("dgl"))


@contextlib.contextmanager
def stopping(after: int) -> Iterator[Any]:
    asked = iter(range(10**6))
    yield lambda: next(asked) == after


@pytest.mark.parametrize("after", [1, 3, 5])  # in the first epoch, at its end, in the second
def test_an_interrupted_run_continues_bit_for_bit(
    after: int, dgl: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "stop_requests", lambda: stopping(after))
        with pytest.raises(Interrupted, match="continue with: it"):
            trained(BASE, tmp_path)
    assert read_rows(tmp_path / compare.ROWS, "run") == {}
    row = trained(BASE, tmp_path)
    assert outcome(row) == outcome(dgl)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_finished_run_is_not_run_again(dgl: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_row(tmp_path / compare.ROWS, dgl)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"run": "cut off')
    monkeypatch.setattr(compare, "train_one", lambda *_: pytest.fail("trained again"))
    # Workers and the place of the data do not decide the outcome.
    moved = validate({**SETTINGS, "data": {**SETTINGS["data"], "workers": 1, "root": "elsewhere"}}, "test")
    assert compare.train_all([moved], tmp_path, QUIET, "") == 0
    other = {**dgl, "run": "other"}
    add_row(tmp_path / compare.ROWS, other)
    assert read_rows(tmp_path / compare.ROWS, "run") == {dgl["run"]: dgl, "other": other}


def test_every_method_sees_the_same_weights_and_batches(dgl: dict[str, Any], tmp_path: Path) -> None:
    same = with_method(["dgl", {"accumulation": {"parts": 1}}])
    row = trained(same, tmp_path)
    assert row["run"] != dgl["run"]
    assert outcome(row) == outcome(dgl)
    assert outcome(trained(with_method(["dgl"], seed=1), tmp_path)) != outcome(dgl)


def test_recomputation_and_cuts_of_end_to_end_training_need_no_run_of_their_own(tmp_path: Path) -> None:
    settings = compare.identity(with_method(["e2e", "checkpointing"]))
    instead = compare.as_config(BASE, compare.trained_as(settings))
    assert (instead.method, instead.blocks.num_blocks) == (["e2e"], 1)
    rows = [trained(config, tmp_path) for config in (with_method(["e2e", "checkpointing"]), instead)]
    assert outcome({**rows[0], "cuts": []}) == outcome(rows[1])


def test_two_processes_share_the_list(tmp_path: Path) -> None:
    runs = [with_method(["dgl"], seed=seed) for seed in range(4)]
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    processes = [context.Process(target=compare.train_all, args=(runs, tmp_path, QUIET, "")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    keys = [json.loads(line)["run"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted(keys) == sorted(compare.key_of(compare.identity(config)) for config in runs)


def test_a_claimed_run_is_left_to_its_process(dgl: dict[str, Any], tmp_path: Path) -> None:
    with compare.claimed(tmp_path / "runs" / f"{dgl['run']}.lock") as mine:
        assert mine
        assert compare.train_all([BASE], tmp_path, QUIET, "") == 1
    assert not (tmp_path / "rows.jsonl").exists()


def test_order_and_identity_of_runs() -> None:
    ways = compare.variants(BASE, own("dgl", "[{dgl: {}}]", "[{dgl: {head: linear}}]"), [2, 3], parts=2)
    names = [(way["method"], way["blocks"]["num_blocks"]) for way in ways]
    linear, parts = [{"dgl": {"head": "linear"}}], ["e2e", {"accumulation": {"parts": 2}}]
    assert names == [
        (["e2e"], 1), (["e2e", "checkpointing"], 2), (parts, 1), (["dgl"], 2), (linear, 2),
        (["e2e", "checkpointing"], 3), (["dgl"], 3), (linear, 3),
    ]  # fmt: skip
    runs = compare.runs_of(BASE, ways, [5, 6])
    assert [run.train.seed for run in runs] == [5] * 6 + [6] * 6
    assert [run.method for run in runs[:3]] == [["e2e"], parts, ["dgl"]]
    keys = {compare.key_of(compare.identity(run)) for run in runs}
    assert len(keys) == len(runs)
    for changed in ({"optim": {"lr": 0.05}}, {"train": {"epochs": 3}}, {"data": {"name": "digits", "limit": 161}}):
        assert compare.key_of(compare.identity(validate({**SETTINGS, **changed}, "test"))) not in keys


def test_costs_are_those_of_a_literal_step_and_weighted_by_kind() -> None:
    guided = ["dgl", {"pgl": {"every": 3}}]
    ways = [
        compare.identity(with_method(m, k))
        for m, k in ((["e2e"], 1), (["dgl"], 3), (guided, 3), (["e2e", "checkpointing"], 3))
    ]
    found = list(compare.measure_costs(BASE, ways, 1, lambda _: None).values())
    inputs, targets = next(iter(build(BASE).data.train.epoch(0)))
    for way, one in zip(ways[:2], found, strict=False):
        literal = cost(build(compare.as_config(BASE, way)).network, inputs, targets)
        assert (one["activation_bytes"], one["flops"]) == (literal.activation_bytes, literal.flops)
        assert one["auxiliary_parameters"] == literal.auxiliary_parameters
    steps = 2 * 3  # two epochs of three batches, of which steps 0 and 3 are guided
    assert len(build(BASE).data.train) * 2 == steps
    assert found[2]["flops"] == pytest.approx((2 * found[3]["flops"] + 4 * found[1]["flops"]) / steps)
    assert found[2]["activation_bytes"] == max(found[1]["activation_bytes"], found[3]["activation_bytes"])
    assert found[0]["time_ratio"] == 1.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    compare.compare(BASE, out, QUIET, **{**COMPARED, "methods": ["dgl"], "seeds": [0, 1]})
    compare_report.report(out)
    return out


def test_table_and_picture_come_from_the_files_alone(finished: Path, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "costs.json"):
        (tmp_path / name).write_text((finished / name).read_text())
    text = compare_report.report(tmp_path)
    assert text.splitlines()[1:] == (finished / "table.md").read_text().splitlines()[1:]
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:]]
        for line in text.splitlines()
        if "|" in line
    }
    rows = read_rows(tmp_path / compare.ROWS, "run").values()
    for name, method in (("e2e", ["e2e"]), ("dgl, K=3", ["dgl"])):
        a, b = (100 * row["score"] for row in rows if row["settings"]["method"] == method)
        assert cells[name][0] == f"{(a + b) / 2:.1f} ± {abs(a - b) / 2:.1f}"
        assert cells[name][1] == f"{a:.1f}, {b:.1f}"
    assert cells["e2e+checkpointing, K=3"][:2] == [cells["e2e"][0], "as end-to-end, bit for bit"]
    costs = {tuple(map(str, c["settings"]["method"])): c for c in compare.read_costs(tmp_path).values()}
    ratio = costs[("dgl",)]["activation_bytes"] / costs[("e2e",)]["activation_bytes"]
    assert cells["dgl, K=3"][2] == f"{ratio:.3f}"


def test_equal_time_gives_end_to_end_the_epochs_that_fit(finished: Path) -> None:
    ways = compare.variants(BASE, own("dgl"), [3], parts=1)
    costs = compare.read_costs(finished)
    for way, ratio in zip(ways, (1.0, 1.25, 2.2), strict=True):
        costs[compare.key_of(compare.costing(way))]["time_ratio"] = ratio
    longer = compare.in_the_same_time(ways, costs, own("dgl"))
    # 2 epochs at 2.2 times the time: 4.4 of end-to-end training, 3.52 with checkpointing at 1.25.
    assert [(way["method"], way["train"]["epochs"]) for way in longer] == [(["e2e"], 4), (["e2e"], 4)]
    way = {**ways[2], "train": {**ways[2]["train"], "epochs": 10}}
    assert [compare.equal_epochs(way, rival, costs) for rival in ways[:2]] == [22, 18]


def test_a_run_that_diverges_is_a_row_of_its_own_and_not_run_again(finished: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wild = validate({**SETTINGS, "optim": {"lr": 1e18}}, "test")
    row = trained(wild, tmp_path)
    assert "the loss of" in row["failed"] and "score" not in row
    (tmp_path / "costs.json").write_text((finished / "costs.json").read_text())
    assert "seed 0 failed" in compare_report.table(tmp_path)


def test_what_is_wrong_is_said_before_anything_is_trained(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown method 'dgi'; did you mean 'dgl'"):
        compare.compare(BASE, tmp_path, QUIET, **{**COMPARED, "methods": ["dgi"]})
    assert not (tmp_path / "rows.jsonl").exists()
    with pytest.raises(ConfigError, match=r"--equal-time dgl.man: it is not among the methods; give it with -m too"):
        compare.compare(BASE, tmp_path, QUIET, **{**COMPARED, "methods": ["dgl"], "equal_time": ["dgl+man"]})
    other = validate({**SETTINGS, "model": {"name": "resnet20"}}, "test")
    with pytest.raises(ConfigError, match=r"compares methods with model .*resnet8.*; give another --out"):
        compare.compare(other, finished, QUIET, **{**COMPARED, "methods": ["dgl"]})
    with pytest.raises(ConfigError, match="holds no comparison yet; name a recipe and methods first"):
        compare_report.report(tmp_path / "nothing")


def test_a_contestant_has_settings_of_its_own() -> None:
    compiled, adam, linear = own(
        "e2e train.compile=true",
        "dgl  optim.name=adamw optim.lr=0.002 optim.options={eps: 1.0e-5, betas: [0.8, 0.9]}",
        "[{dgl: {head: linear}}, man] optim.per_block=true",
    )
    assert compiled == validate({**SETTINGS, "method": ["e2e"], "train": {**SETTINGS["train"], "compile": True}}, "")
    assert (adam.method, adam.optim.name, adam.optim.lr) == (["dgl"], "adamw", 0.002)
    assert adam.optim.options == {"eps": 1e-5, "betas": [0.8, 0.9]} and adam.train == BASE.train
    assert linear.method == [{"dgl": {"head": "linear"}}, "man"] and linear.optim.per_block
    assert own("dgl") == [BASE]
    ways = compare.variants(BASE, [compiled, adam], [3], parts=1)
    assert [compare.as_config(BASE, way) for way in ways[2:]] == [
        validate({**compare.dataclasses.asdict(one), "blocks": {"num_blocks": k}}, "")
        for one, k in ((compiled, 1), (adam, 3))
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dgl train.seed=1", r"train\.seed is the same for all.*optim\.\*"),
        ("dgl data.limit=3", r"data\.limit is the same for all"),
        ("dgl optim.lr", "unknown method"),
        ("dgl optim.rate=1", "unknown setting 'rate'"),
        ("dgl optim.lr=[", "no YAML value|is not a YAML value"),
    ],
)
def test_other_settings_of_one_contestant_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.compare(BASE, tmp_path, QUIET, **{**COMPARED, "methods": [text]})


def test_an_opponent_that_steps_in_the_backward_pass_is_measured_and_not_trained(tmp_path: Path) -> None:
    methods = ["e2e optim.in_backward=true", "e2e optim.name=adamw optim.lr=0.002", "dgl optim.per_block=true"]
    small = {"data": {**SETTINGS["data"], "limit": 80}, "train": {**SETTINGS["train"], "epochs": 1}}
    base = validate({**SETTINGS, **small}, "test")
    compare.compare(base, tmp_path, QUIET, **{**COMPARED, "methods": methods, "equal_time": methods[2:]})
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:]]
        for line in compare_report.report(tmp_path).splitlines()
        if "|" in line
    }
    names = ["e2e", "e2e, in_backward True", "e2e, name adamw, lr 0.002", "dgl, K=3, per_block True"]
    plain, early, adam, ours = (cells[name] for name in names)
    assert early[:2] == [plain[0], "as end-to-end, bit for bit"]
    assert plain[2:6] == ["1.000"] * 4 and "-" not in early[2:6]
    parameters = sum(p.numel() for p in build(as_whole(BASE)).network.parameters())
    tensors = len(list(build(as_whole(BASE)).network.parameters()))
    assert adam[5] == f"{(2 * parameters + tensors) / parameters:.3f}" and plain[5] == early[5] == "1.000"
    assert "not run" not in ours[9] and ours[9] != "-", "end-to-end in the same time"
    rows = read_rows(tmp_path / compare.ROWS, "run").values()
    assert not any(row["settings"]["optim"]["in_backward"] for row in rows)


def test_a_compiled_contestant_is_compiled_whole_and_counted_before(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[localgrad.LocalNetwork] = []
    compile_blocks = localgrad.LocalNetwork.compile_blocks

    def eagerly(network: localgrad.LocalNetwork) -> None:
        compile_blocks(network, backend="eager")
        compiled.append(network)

    monkeypatch.setattr(localgrad.LocalNetwork, "compile_blocks", eagerly)
    ways = compare.variants(BASE, own("e2e train.compile=true"), [3], parts=1)
    plain, fast = list(compare.measure_costs(BASE, [ways[0], ways[2]], 1, lambda _: None).values())
    assert [network.running._compiled_call_impl is not None for network in compiled] == [True]
    assert fast["flops"] == plain["flops"] and fast["state_bytes"] == plain["state_bytes"] > 0
    assert (fast["activation_bytes"], fast["total_bytes"]) == (None, None) and plain["total_bytes"] > 0
    assert (fast["peak_bytes"] is None) == (plain["peak_bytes"] is None)


def as_whole(config: Config) -> Config:
    return compare.as_config(config, compare.trained_as(compare.identity(with_method(["e2e"]))))


def test_the_reference_is_the_one_that_most_share_settings_with(finished: Path, tmp_path: Path) -> None:
    """Whatever stands first, and however many epochs another one was trained for."""
    costs = compare.read_costs(finished)
    first = next(iter(costs.values()))
    other = {**first, "settings": {**first["settings"], "optim": {**first["settings"]["optim"], "name": "adamw"}}}
    changed = {compare.key_of(other["settings"]): {**other, "activation_bytes": None}, **costs}
    (tmp_path / "costs.json").write_text(json.dumps(changed))
    (tmp_path / "rows.jsonl").write_text((finished / "rows.jsonl").read_text())
    lines = compare_report.lines_of(tmp_path)
    assert compare_report.reference_of(lines).settings["optim"]["name"] == "sgd"
    assert "e2e, name adamw" in compare_report.report(tmp_path)


def test_work_of_a_step() -> None:
    task = localgrad.tasks.classification(10)
    dgl = localgrad.methods.dgl(task)
    assert len({dgl.work(4, step) for step in range(12)}) == 1
    distilled = localgrad.methods.last_head_distillation(dgl, every=4)
    assert [distilled.work(4, step) == distilled.work(4, 0) for step in range(8)] == [True, False, False, False] * 2
