"""Probes, gradient cosines and feature similarity against literal calculations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from bench.diagnose import diagnose
from rich.console import Console
from torch.nn import functional as F

import localgrad
from localgrad import methods
from localgrad.config import validate
from localgrad.study.compare import identity, key_of, train_all
from localgrad.study.diagnosis import features_of, gradient_cosines, linear_cka, linear_probe

TASK = localgrad.tasks.classification(10)


def network_of(method: localgrad.method.Method, num_blocks: int = 3) -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    model = localgrad.models.create("resnet8")
    return localgrad.localize(model, method, num_blocks, example=torch.randn(2, 3, 16, 16))


def batch(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 10


def test_cka_by_features_instead_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20, d, generator=generator, dtype=torch.float64) for d in (5, 7))
    x, y = a - a.mean(0), b - b.mean(0)
    literal = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert linear_cka(a, b) == pytest.approx(literal.item(), rel=1e-12)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    assert linear_cka(a, 3 * a @ rotation + 2) == pytest.approx(1.0, rel=1e-12)


def test_a_probe_is_ridge_regression_on_standardised_features() -> None:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(n, 6, generator=generator) * 3 + 1 for n in (200, 100))
    y, u = ((part[:, 0] > 1).long() + (part[:, 1] > 1).long() for part in (x, z))
    mean, spread = x.double().mean(0), x.double().std(0)
    a, b = (x - mean) / spread, (z - mean) / spread
    # Ridge regression again, as least squares on 6 more samples; the columns are centred, so the constant is the mean.
    targets = F.one_hot(y).double()
    weight = torch.linalg.lstsq(
        torch.cat([a, math.sqrt(2.0) * torch.eye(6)]), torch.cat([targets - targets.mean(0), torch.zeros(6, 3)])
    ).solution
    expected = ((b @ weight + targets.mean(0)).argmax(1) == u).double().mean().item()
    assert linear_probe(x, y, z, u) == pytest.approx(expected)
    assert 0.6 < expected < 1.0
    noise = torch.randn(100, 6, generator=generator)
    assert linear_probe(x, y, noise, u) < expected - 0.1


def test_features_are_those_at_the_boundaries() -> None:
    network = network_of(methods.dgl(TASK))
    inputs, _ = batch()
    seen: list[torch.Tensor] = []
    network.eval()
    modules = dict(network.model.named_modules())
    hooks = [modules[c.name].register_forward_pre_hook(lambda _, args: seen.append(args[0])) for c in network.cuts]
    with torch.no_grad():
        logits = network.model(inputs)
    for hook in hooks:
        hook.remove()
    expected = [*(F.adaptive_avg_pool2d(f, 4).flatten(1) for f in seen), logits]
    for ours, theirs in zip(features_of(network, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradient_cosines_compare_with_plain_back_propagation() -> None:
    network = network_of(methods.dgl(TASK, head="linear"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    cosines = gradient_cosines(network, *batch())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    localgrad.backward(network, *batch())
    local = [torch.cat([p.grad.flatten() for p in network.parameters_of(k) if p.grad is not None]) for k in range(3)]
    network.zero_grad(set_to_none=True)
    F.cross_entropy(network.model(batch()[0]), batch()[1]).backward()
    whole = [torch.cat([p.grad.flatten() for p in network.parameters_of(k) if p.grad is not None]) for k in range(3)]
    for cosine, a, b in zip(cosines, local, whole, strict=True):
        assert cosine == pytest.approx((a @ b / (a.norm() * b.norm())).item(), abs=1e-5)
    assert cosines[-1] == pytest.approx(1.0, abs=1e-5)
    assert cosines[0] < 0.9
    assert gradient_cosines(network_of(methods.e2e(TASK)), *batch()) == pytest.approx([1.0] * 3, abs=1e-5)


def test_a_kept_run_is_diagnosed(tmp_path: Path) -> None:
    settings = {
        "model": {"name": "resnet8"}, "data": {"name": "digits", "augment": False, "limit": 160},
        "train": {"epochs": 1, "batch_size": 48, "threads": 1},
    }  # fmt: skip
    runs = [
        validate({**settings, "method": [name], "blocks": {"num_blocks": k}}, "test")
        for name, k in (("dgl", 3), ("e2e", 1))
    ]
    train_all(runs, tmp_path, Console(quiet=True), "", keep=True)
    folders = [tmp_path / "runs" / key_of(identity(config)) for config in runs]
    found = diagnose(folders[0], folders[1], samples=100)
    assert {name: len(values) for name, values in found.items()} == {"probe": 3, "gradient cosine": 3, "CKA": 3}
    assert all(0.0 < value < 1.0 for value in found["CKA"])
    assert diagnose(folders[0], folders[0], samples=100)["CKA"] == pytest.approx([1.0] * 3)
