"""The survey: one row for each model, whatever the model does."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from localgrad import ConfigError, MethodError
from localgrad.cli import app
from localgrad.method import Method
from localgrad.study import examination, survey
from localgrad.study.examination import CHECKS, classifier, examine
from localgrad.study.rows import read_rows
from localgrad.study.survey import in_processes, select
from reach import REACH


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3 if k == 0 else 8, 8, 3, 2, 1) for k in range(4)]
        self.layers = nn.ModuleList(nn.Sequential(layer, nn.BatchNorm2d(8), nn.Dropout(0.1)) for layer in layers)
        self.mask = nn.Parameter(torch.zeros(8))  # never used
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.fc(x.mean((2, 3)))


class Picky(Net):
    """Runs on images of one size only."""

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != (96, 96):
            raise ValueError("images must be 96x96")
        return super().forward(x)


class Branching(Net):
    """Decides by values, which tracing cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > -100 else -x)


class Pair(Net):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class Shallow(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = self.layers[:1]


class Restless(Net):
    """Draws numbers torch's generators know nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 + self.training * int.from_bytes(os.urandom(1)) / 256)


def row_of(model: type[nn.Module], sizes: tuple[int | None, ...] = (32, 96)) -> dict[str, Any]:
    return examine(model.__name__, lambda: classifier(lambda size: model(), sizes))


@pytest.mark.parametrize("model", [Net, Branching])
def test_a_model_that_passes(model: type[nn.Module]) -> None:
    row = row_of(model)
    assert row["ok"] and row["reasons"] == row["refused"] == {} and row["checks"] == dict.fromkeys(CHECKS, True)
    assert (row["image_size"], row["cut_points"], row["without_gradient"]) == (32, 4, ["mask"])
    assert len(row["cuts"]) == 3 and [len(step) for step in row["block_losses"]] == [4] * examination.STEPS
    assert row == json.loads(json.dumps(row))


def test_the_smallest_size_it_runs_on_is_taken() -> None:
    assert row_of(Picky)["image_size"] == 96
    row = row_of(Picky, (32, 64))
    assert not row["ok"] and set(row["checks"].values()) == {None}
    assert "images must be 96x96" in row["reasons"]["built"]


@pytest.mark.parametrize(
    "model, what, reason",
    [
        (Pair, "built", "in training mode it returns a tuple"),
        (Shallow, "cut", "use 1 to 2 blocks"),
        (Restless, "gradients", "two runs of the model itself"),
    ],
)
def test_failures_have_a_reason_in_one_line(model: type[nn.Module], what: str, reason: str) -> None:
    row = row_of(model)
    assert not row["ok"] and not row["checks"].get(what)
    assert reason in row["reasons"][what] and "\n" not in row["reasons"][what]


def test_a_model_with_inputs_and_a_task_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    row = examine("reach:layer_drop", lambda: REACH["layer_drop"])
    assert row["ok"], row["reasons"]

    def refusing(base: Method) -> Method:
        raise MethodError("no unit can be copied")

    monkeypatch.setattr(examination.methods, "man_pp", refusing)
    row = examine("reach:image_and_metadata", lambda: REACH["image_and_metadata"])
    assert row["ok"] and row["checks"]["man_pp"] is None and row["refused"] == {"man_pp": "no unit can be copied"}
    assert list(survey.failures([row])) == ["reach:image_and_metadata: man_pp refused: no unit can be copied"]


def job(name: str) -> dict[str, Any]:
    return {"model": name, "ok": True, "checks": dict.fromkeys(CHECKS, True), "reasons": {}, "seconds": 0.0}


def test_crashes_and_hangs_are_rows() -> None:
    jobs: dict[str, Any] = {
        "good": partial(job, "good"),
        "crash": partial(os._exit, 7),
        "hang": partial(time.sleep, 99),
    }
    started = time.monotonic()
    rows = {row["model"]: row for row in in_processes(jobs, workers=2, timeout=6.0)}
    assert time.monotonic() - started < 25
    assert rows["good"]["ok"] and not rows["crash"]["ok"] and not rows["hang"]["ok"]
    assert "code 7" in rows["crash"]["reasons"]["process"] and "longer timeout" in rows["hang"]["reasons"]["process"]


def test_only_failures_in_the_file_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(jobs: dict[str, Any], *_: Any) -> Any:
        for name in jobs:
            ran.append(name)
            yield job(name) | {"ok": name != "timm:b", "reasons": {} if name != "timm:b" else {"cut": "no"}}

    monkeypatch.setattr(survey, "in_processes", run)
    out = tmp_path / "deep" / "rows.jsonl"
    assert [new for _, new in survey.survey("timm", {"a": "A", "b": "B"}, out)] == [True, True]
    with out.open("a") as file:
        file.write('{"model": "timm:c", "ok')  # torn
    assert [new for _, new in survey.survey("timm", {"a": "A", "b": "B", "c": "C"}, out)] == [False, True, True]
    assert list(read_rows(out, "model")) == ["timm:a", "timm:b", "timm:c"]
    assert list(survey.failures(read_rows(out, "model").values())) == ["timm:b: cut: no"]
    assert ran == ["timm:a", "timm:b", "timm:b", "timm:c"] and len(read_rows(out, "model")) == 3


def test_selection(tmp_path: Path) -> None:
    assert select("torchvision", "resnet1?") == {"resnet18": "resnet18"}
    assert select("timm", "resnet50") == {"resnet50": "resnet"}
    cache = tmp_path / "families.json"
    for _ in range(2):  # counted, then remembered
        assert select("timm", "gmlp_*", cache=cache) == {"gmlp_ti16_224": "mlp_mixer"}
    assert select("timm", "gmlp_*", every=True).keys() == {"gmlp_ti16_224", "gmlp_s16_224", "gmlp_b16_224"}
    assert select("reach:REACH", "conv*") == {"conv1d": "conv1d", "convnext": "convnext"}
    for library, where in (("timm", "see localgrad list models timm"), ("reach:REACH", "it has transformer")):
        with pytest.raises(ConfigError, match=f"no model of {library} is called like 'nothing_like_it'; {where}"):
            select(library, "nothing_like_it")


@pytest.mark.parametrize("source", ["no_such_module:X", "reach:NO_SUCH_NAME", "reach:Candidate", ":X"])
def test_own_models_that_are_none_are_refused(source: str) -> None:
    with pytest.raises(ConfigError, match="map"):
        select(source)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text(json.dumps(job("torchvision:resnet18") | {"family": "resnet18"}) + "\n")
    options = ["survey", "torchvision", "--filter", "resnet18", "--out", str(out)]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0 and "1 of 1 models pass every check" in shown.output
