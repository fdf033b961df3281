"""What a step costs, and pictures of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import localgrad
from localgrad import methods
from localgrad.costs import cost, step_seconds
from localgrad.measure.plots import comparison_picture, curves_picture

TASK = localgrad.tasks.classification(10)
X, Y = torch.randn(8, 1, 16, 16), torch.arange(8)


def network_of(method: Any, num_blocks: int = 4) -> localgrad.LocalNetwork:
    model = localgrad.models.create("resnet8", in_channels=1)
    return localgrad.localize(model, method, num_blocks, example=X[:2])


def test_measuring_changes_nothing() -> None:
    network = network_of(methods.dgl(TASK)).eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    first, second = cost(network, X, Y), cost(network, X, Y)
    assert first == second
    assert len(step_seconds([network], X, Y, rounds=1)) == 1
    assert not network.training and all(p.grad is None for p in network.parameters())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_costs_of_three_ways_to_train() -> None:
    local, plain, again = (
        cost(network_of(m), X, Y)
        for m in (methods.dgl(TASK), methods.e2e(TASK), methods.checkpointing(methods.e2e(TASK)))
    )
    parameters = sum(p.numel() for p in localgrad.models.create("resnet8", in_channels=1).parameters())
    assert local.parameters == plain.parameters == again.parameters == parameters
    assert local.auxiliary_parameters > 0 == plain.auxiliary_parameters == again.auxiliary_parameters
    assert local.activation_bytes < plain.activation_bytes and again.activation_bytes < plain.activation_bytes
    assert plain.flops < again.flops < 1.34 * plain.flops  # at most one more forward pass
    for c in (local, plain, again):
        assert c.twin_parameters == 0 and c.activation_bytes <= c.total_bytes
    assert plain.total_bytes >= 4 * parameters  # all gradients are there at the end


def test_flops_of_a_linear_network_are_what_the_formula_says() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 10))
    x = torch.randn(7, 6)
    found = cost(localgrad.localize(model, methods.e2e(TASK), 2, example=x), x, torch.arange(7))
    forward = 2 * 7 * (6 * 5 + 5 * 10)
    assert found.flops == forward + forward + 2 * 7 * 5 * 10  # gradients of both weights, and of the second input


def history(epochs: int, heads: int, validation: bool = True) -> list[dict[str, Any]]:
    names = [*(f"block {k + 1}" for k in range(heads)), "model"]
    rows = []
    for epoch in range(1, epochs + 1):
        row: dict[str, Any] = {"epoch": epoch}
        for split in ("train", "validation") if validation else ("train",):
            row[split] = {
                "loss": dict.fromkeys(names, 2.0 / epoch),
                "score": dict.fromkeys(names[-2:], 1 - 0.5 / epoch),
            }
        rows.append(row)
    return rows


@pytest.mark.parametrize(("epochs", "heads", "validation"), [(1, 3, True), (2, 0, False), (30, 15, True)])
def test_curves(epochs: int, heads: int, validation: bool, tmp_path: Path) -> None:
    curves_picture(history(epochs, heads, validation), "a run", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_comparison(tmp_path: Path) -> None:
    results = [
        {
            "method": name, "blocks": 4,
            "split": "test", "last": {"score": {"block 1": 0.5, "blocks 1-2": 0.6, "model": 0.9 + index / 100}},
            "cost": {"step_seconds": 0.01 * (index + 1), "activation_bytes": 2**20 * (9 - index)},
        }
        for index, name in enumerate(("dgl", "e2e", "e2e+checkpointing", "a", "b", "c", "d", "e", "f"))
    ]  # fmt: skip
    comparison_picture(results, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
