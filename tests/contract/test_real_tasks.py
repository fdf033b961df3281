"""Numbers, several labels and one class of pixels learnt from real pictures, better than any constant answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from localgrad import methods
from localgrad.task import Metric, Task
from localgrad.train.meters import evaluate

Batches = list[tuple[Tensor, Any]]
METHODS: dict[str, Callable[[Task], localgrad.Method]] = {
    "dgl": lambda task: methods.dgl(task, head="1c2f"),
    "man(dgl)": lambda task: methods.man(methods.dgl(task, head="1c2f")),
}


def digits(labelled: Callable[[Tensor], Tensor]) -> tuple[Batches, Batches]:
    """Training and test batches of the digits that come with localgrad, with targets made from what is written."""
    loaded = localgrad.data.load("digits", batch_size=64, validation=0.0, augment=False)
    train, test = ([(x, labelled(y)) for x, y in split.epoch(0)] for split in (loaded.train, loaded.test))
    return train, test


def trained(model: nn.Module, method: localgrad.Method, batches: Batches, epochs: int) -> localgrad.LocalNetwork:
    network = localgrad.localize(model, method, 3, example=batches[0][0][:2]).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for step, (x, y) in enumerate(batches * epochs):
        localgrad.backward(network, x, y, step)
        optimizer.step()
        optimizer.zero_grad()
        localgrad.exchange(network)
    return network


def of_a_constant(task: Task, train: Tensor, test: Tensor) -> dict[str, float]:
    """What the metric says of an answer that is the mean of the training targets, whatever the picture."""
    metric: Metric = task.metric()
    metric.update(train.mean(0).expand_as(test), test)
    return metric.compute()


@pytest.mark.parametrize("name", METHODS)
def test_the_number_that_is_written(name: str) -> None:
    torch.manual_seed(0)
    train, test = digits(lambda y: (y.float() - 4.5) / 2.9)
    task = localgrad.tasks.regression()
    network = trained(localgrad.models.resnet8(1, in_channels=1), METHODS[name](task), train, 3)
    constant = of_a_constant(task, torch.cat([y for _, y in train])[:, None], torch.cat([y for _, y in test])[:, None])
    found = evaluate(network, test)
    assert constant["r2"] == 0 and constant["rmse"] > 0.9
    assert found["metrics"]["r2"] > 0.7 and found["metrics"]["rmse"] < 0.6 * constant["rmse"]
    assert min(found["score"].values()) > 0.3  # every head's


@pytest.mark.parametrize("name", METHODS)
def test_properties_of_the_number_that_is_written(name: str) -> None:
    """Even, at least 5, prime, with a closed loop; a tenth of the labels is not known."""
    pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    table = torch.zeros(10, 4)
    for column, numbers in enumerate(((0, 2, 4, 6, 8), (5, 6, 7, 8, 9), (2, 3, 5, 7), (0, 6, 8, 9))):
        table[list(numbers), column] = 1.0
    train, test = digits(lambda y: table[y])
    for _, y in train:
        y[torch.rand(y.shape) < 0.1] = -1.0
    task = localgrad.tasks.multilabel(4, classes=("even", "large", "prime", "looped"))
    network = trained(localgrad.models.resnet8(4, in_channels=1), METHODS[name](task), train, 3)
    constant = of_a_constant(task, table, torch.cat([y for _, y in test]))
    found = evaluate(network, test)
    assert constant["map"] < 0.5
    assert found["metrics"]["map"] > 0.9 and found["metrics"]["accuracy"] > 0.85


@pytest.mark.data
@pytest.mark.parametrize("name", METHODS)
def test_where_the_road_is(name: str, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (real_data / "camvid").is_dir():
        pytest.skip(f"needs CamVid in {real_data}")
    pytest.importorskip("torchmetrics")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    loaded = localgrad.data.masks.load(
        "camvid", root=real_data, batch_size=8, image_size=(48, 64), limit=96, validation=0.0, augment=False
    )
    road = loaded.classes.index("Road")

    def only(batches: Any) -> Batches:
        return [(x, torch.where(y == 255, y, (y == road).long())) for x, y in batches]

    batches = only(loaded.train.epoch(0))
    train, test = batches[:6], batches[6:]
    task = localgrad.tasks.segmentation(1, classes=("road",), head_width=16)
    layers = [nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.BatchNorm2d(b), nn.ReLU())
              for a, b, s in ((3, 16, 2), (16, 32, 2), (32, 32, 1), (32, 32, 1))]  # fmt: skip
    network = trained(nn.Sequential(*layers, nn.Conv2d(32, 1, 1)), METHODS[name](task), train, 12)
    masks = torch.cat([y for _, y in test])
    everywhere = task.metric()
    everywhere.update(torch.ones(len(masks), 1, 2, 2), masks)
    constant, found = everywhere.compute()["iou/road"], evaluate(network, test)["metrics"]["iou/road"]
    assert 0.2 < constant < 0.5 and found > constant + 0.25
