"""Micro-batches of unequal value give the gradient of the whole batch, by every method on every task that it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_parts_and_replicas import agree, boxes, masks, trained, without_batch_statistics
from torch import Tensor, nn

import localgrad
from localgrad import methods, models
from localgrad.method import Method
from localgrad.tasks import classification, detection, segmentation
from zoo import bases, composed


class Unit(nn.Module):
    """Looks at one sample at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x).relu())


def classifier() -> nn.Module:
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(Unit() for _ in range(4)), *ends)


def dense() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(Unit() for _ in range(4)), nn.Conv2d(8, 3, 1))


def labels() -> tuple[Tensor, Tensor]:
    x = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, torch.tensor([-100, -100, -100, 0, 1, -100, 2])


def soft() -> tuple[Tensor, Tensor]:
    x, y = labels()
    return x, nn.functional.one_hot(y.clamp(min=0), 3).double() * 0.7 + 0.1


def few_boxes() -> tuple[Tensor, list[dict[str, Tensor]]]:
    x, y = boxes()
    return x[:, :, :64, :64], y


def fcos() -> nn.Module:
    return models.fcos(num_classes=2, backbone="resnet18", norm="group", width=32)


def methods_of(task: Any) -> dict[str, Method]:
    basic = bases(task)
    basic["dgl"] = methods.dgl(task, head="linear")
    every = composed(basic)[0]
    return {n: m for n, m in every.items() if (n in basic or n.endswith("(dgl)")) and n != "accumulation(dgl)"}


# What they compare are no sums over samples: similarities of pairs, the distance of two means.
COMPARE = {"predsim", "local_critic"}
PIXELS: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
TASKS: dict[str, tuple[Any, Any, Any]] = {
    "labels": (classification(3, class_weights=(1.0, 9.0, 0.1), label_smoothing=0.1, **PIXELS), classifier, labels),
    "soft labels": (classification(3, label_smoothing=0.1, **PIXELS), classifier, soft),
    "masks": (segmentation(3, class_weights=(1.0, 9.0, 0.1), head_width=8, **PIXELS), dense, masks),
    "fcos": (detection(2, **PIXELS), fcos, few_boxes),
}
CASES = [(task, name) for task in ("labels", "soft labels", "masks") for name in methods_of(TASKS[task][0])]
CASES += [("fcos", "man(dgl)")]  # `test_parts_and_replicas` has dgl, windows and pgl of detectors


def network_of(task: str, method: Method, parts: int) -> localgrad.LocalNetwork:
    _, build, batch = TASKS[task]
    torch.manual_seed(1)
    made = methods.accumulation(method, parts=parts) if parts > 1 else method
    network = localgrad.localize(build().double(), made, 3, example=batch()[0][:2])
    without_batch_statistics(network.auxiliary)
    return network.double()


@pytest.mark.parametrize(("task", "name"), CASES, ids=lambda value: value)
def test_parts_of_unequal_value(task: str, name: str) -> None:
    batch, method = TASKS[task][2], methods_of(TASKS[task][0])[name]
    if name == "predsim" and task == "masks":
        pytest.skip("needs one class for each image")
    parts = 2 if task == "fcos" else 3  # its GroupNorm needs two values at the coarsest level
    whole, found = (trained(network_of(task, method, several), *batch()) for several in (1, parts))
    if name in COMPARE:
        assert all(value.isfinite().all() for value in found.values())
    elif name == "feature_distillation":  # its teacher has single precision
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-7)
    else:
        agree(found, whole)
