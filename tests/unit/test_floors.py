"""``bench/floors.py``: what it counts without data is what a literal step does, and floors follow from it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from bench.floors import CASES, floor_of, main, measured
from torch import nn

from localgrad import localize, methods, tasks
from localgrad.costs import run_step
from localgrad.measure.work import Rates, Work
from localgrad.method import Method
from localgrad.planning import Planner

TASK = tasks.classification(5)
CARD = Rates(1e9, 1e8)


def planner(model: nn.Module, precision: str = "fp32") -> Planner:
    return Planner(model, (3, 4, 4), 6, precision, CARD, TASK)


def test_a_linear_layer_by_hand() -> None:
    found = floor_of(planner(nn.Sequential(nn.Flatten(), nn.Linear(48, 5))), methods.e2e(TASK), 1, True, CARD)
    assert found.flops == 2 * (2 * 6 * 48 * 5)  # the product, and the gradient of the weight
    x, weight, bias, logits, scalar, targets = 6 * 48, 5 * 48, 5, 6 * 5, 1, 2 * 6  # float32; targets have 8 bytes
    least = (x + weight + bias + logits) + 2 * logits  # the layer; log-softmax
    least += logits + targets + 2 * scalar + (scalar + logits + targets + logits)  # the loss and its gradient
    least += 3 * logits + (logits + x + weight) + (logits + bias)  # log-softmax, weight and bias
    assert 4 * least <= found.bytes <= 1.2 * 4 * least  # what the engine adds is small


@pytest.mark.parametrize("method", [methods.e2e(TASK), methods.dgl(TASK, head="linear")], ids=lambda m: m.name)
def test_floors_follow_from_flops_and_bytes(method: Method) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(8, 5))
    blocks = 1 if not method.terms else 2
    found = floor_of(planner(model), method, blocks, True, CARD)
    assert found.arithmetic == found.flops / 1e9 and found.traffic == found.bytes / 1e8
    least, most = max(found.arithmetic, found.traffic), found.arithmetic + found.traffic
    assert (1 - 1e-9) * least <= found.each <= (1 + 1e-9) * most
    unlimited = floor_of(planner(model), method, blocks, True, Rates(math.inf, 1e8))
    assert unlimited.each == pytest.approx(found.traffic) and unlimited.arithmetic == 0


@pytest.mark.parametrize("method", [methods.e2e(TASK), methods.dgl(TASK, head="linear")], ids=lambda m: m.name)
def test_a_step_without_data_moves_the_bytes_of_a_real_one(method: Method) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(8, 5))
    blocks = 1 if not method.terms else 2
    found = floor_of(planner(model), method, blocks, True, CARD)
    network = localize(model, method, blocks, example=torch.randn(2, 3, 4, 4)).train()
    x, y = torch.randn(6, 3, 4, 4), torch.zeros(6, dtype=torch.long)
    with Work(Rates(math.inf, 1.0)) as work:
        run_step(network, x, y)
    assert (found.bytes, found.flops) == (work.seconds, work.flops)


def test_measured_steps_are_read_from_results(tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text(json.dumps({"data": "cifar10", "e2e-captured": {"best": 50.0}}))
    rows = [{"name": "end-to-end", "variant": v, "seconds": s} for v, s in (("fp32", 2.0), ("bf16+channels_last", 1.0))]
    (tmp_path / "bench-r101.json").write_text(json.dumps({"rows": rows}))
    assert measured("resnet32", tmp_path) == {"e2e-captured": pytest.approx(50 * 1024 / 50_000)}
    assert measured("resnet101", tmp_path) == {"end-to-end": 1.0}
    assert measured("resnet8", tmp_path) == measured("resnet32", None) == {}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["resnet8", "--flops", "1e9", "--bandwidth", "1e9", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "resnet8.json").read_text())
    assert [row["num_blocks"] for row in rows] == [1, 5, 3] and len(rows) == len(CASES["resnet8"].ways)
    assert rows[0]["flops"] < rows[1]["flops"]  # checkpointing runs blocks twice
    assert capsys.readouterr().out.strip() == (tmp_path / "resnet8.md").read_text().strip()
