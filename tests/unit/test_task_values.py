"""Numbers, several labels, one class of pixels, and any loss: values against slow references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from localgrad import Batch, ConfigError
from localgrad.tasks import custom, multilabel, regression, segmentation


def of(targets: Any) -> Batch:
    return Batch(None, targets, 0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- regression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "of_one"),
    [
        ("mse", lambda e: e * e),
        ("l1", abs),
        ("smooth_l1", lambda e: 0.5 * e * e if abs(e) < 1 else abs(e) - 0.5),
    ],
)
def test_regression_by_hand(loss: Any, of_one: Any) -> None:
    output, targets = torch.randn(5, 2, dtype=torch.float64), 3 * torch.randn(5, 2, dtype=torch.float64)
    errors = [(a - b).item() for a, b in zip(output.flatten(), targets.flatten(), strict=True)]
    found = regression(2, loss=loss).loss(output, of(targets))
    assert found.item() == pytest.approx(sum(map(of_one, errors)) / 10, rel=1e-12)


def test_one_number_in_either_form() -> None:
    """(B, 1) against (B,) is no table of all pairs."""
    task, output, targets = regression(), torch.randn(4), torch.arange(4)
    expected = sum((float(o) - float(t)) ** 2 for o, t in zip(output, targets, strict=True)) / 4
    for o in (output, output[:, None]):
        for t in (targets, targets[:, None], targets.double()):
            assert task.loss(o, of(t)).item() == pytest.approx(expected, rel=1e-6)
            assert task.score(o, t).shape == (4,)


@given(st.integers(1, 3), st.integers(2, 9), st.floats(0.0, 3.0), st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=40)
def test_the_variance_that_is_explained(outputs: int, samples: int, noise: float, seed: int) -> None:
    g = generator(seed)
    targets = 1e3 + torch.randn(samples, outputs, generator=g, dtype=torch.float64)
    output = targets + noise * torch.randn(samples, outputs, generator=g, dtype=torch.float64)
    metric = regression(outputs).metric()
    metric.update(output[:1], targets[:1])
    metric.update(output[1:], targets[1:])
    found = metric.compute()
    explained = []
    for j in range(outputs):
        rows = [(output[i, j].item(), targets[i, j].item()) for i in range(samples)]
        middle = sum(y for _, y in rows) / samples
        explained.append(1 - sum((f - y) ** 2 for f, y in rows) / sum((y - middle) ** 2 for _, y in rows))
    assert next(iter(found)) == "r2"
    assert found["r2"] == pytest.approx(min(1.0, max(0.0, sum(explained) / outputs)), abs=1e-9)
    assert found["mae"] == pytest.approx((output - targets).abs().mean().item(), rel=1e-9)
    assert found["rmse"] ** 2 == pytest.approx(F.mse_loss(output, targets).item(), rel=1e-9)
    score = regression(outputs).score(output, targets)
    assert score.dtype == torch.float32 and ((score >= 0) & (score <= 1)).all()


def test_targets_without_variance() -> None:
    task, targets = regression(), torch.full((3,), 2.0)
    assert task.score(torch.tensor([2.0, 2.0, 2.5]), targets).tolist() == [1.0, 1.0, 0.0]
    metric = task.metric()
    metric.update(targets, targets)
    assert metric.compute() == {"r2": 1.0, "mae": 0.0, "rmse": 0.0}


# --- several labels --------------------------------------------------------------------------------------------------


def labels(seed: int = 0, samples: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    logits = torch.randn(samples, 3, generator=g, dtype=torch.float64)
    return logits, torch.randint(-1, 2, (samples, 3), generator=g).double()


@pytest.mark.parametrize("weights", [None, (2.0, 0.5, 7.0)])
def test_several_labels_by_hand(weights: tuple[float, ...] | None) -> None:
    logits, targets = labels()
    targets[0, 0] = 0.3
    total, count = 0.0, 0
    for i in range(len(logits)):
        for j in range(3):
            y, p = targets[i, j].item(), 1 / (1 + math.exp(-logits[i, j].item()))
            if y != -1:
                w = 1.0 if weights is None else weights[j]
                total, count = total - w * y * math.log(p) - (1 - y) * math.log(1 - p), count + 1
    task = multilabel(3, pos_weight=weights)
    assert 0 < count < targets.numel()
    assert task.loss(logits, of(targets)).item() == pytest.approx(total / count, rel=1e-12)
    probabilities = task.logits(logits).softmax(1)[:, 1]
    torch.testing.assert_close(probabilities, logits.sigmoid())


def test_labels_that_are_not_known_count_nowhere() -> None:
    logits, targets = torch.tensor([[1.0, -1.0, 9.0], [1.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, -1.0], [-1.0] * 3])
    assert multilabel(3).score(logits, targets).tolist() == [0.5, 1.0]
    logits.requires_grad_()
    multilabel(3).loss(logits, of(targets)).backward()
    assert logits.grad is not None and (logits.grad != 0).tolist() == [[True, True, False], [False] * 3]


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_by_hand(seed: int) -> None:
    pytest.importorskip("torchmetrics")
    logits, targets = labels(seed, 12)
    targets[:, 2] = targets[:, 2].clamp(max=0)  # never holds
    task = multilabel(3, classes=("a", "b", "never"))
    metric = task.metric()
    metric.update(logits[:5].float(), targets[:5].float())
    metric.update(logits[5:].float(), targets[5:].float())
    found = metric.compute()
    expected = {}
    for j, name in enumerate("ab"):
        ranked = sorted((s, y) for s, y in zip(logits[:, j].tolist(), targets[:, j].tolist(), strict=True) if y != -1)
        hits, precisions = 0, []
        for rank, (_, y) in enumerate(reversed(ranked), 1):
            if y == 1:
                hits += 1
                precisions.append(hits / rank)
        expected[f"ap/{name}"] = sum(precisions) / hits
    known = targets != -1
    right = ((logits > 0) == (targets == 1))[known].double().mean().item()
    mean = sum(expected.values()) / 2
    assert list(found) == ["map", "accuracy", "ap/a", "ap/b"]
    assert found == pytest.approx({"map": mean, "accuracy": right, **expected}, abs=1e-6)


# --- one class of pixels ---------------------------------------------------------------------------------------------


def pixels(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    masks = torch.randint(2, (2, 6, 5), generator=g)
    masks[0, 0] = 255
    return torch.randn(2, 1, 6, 5, generator=g, dtype=torch.float64), masks


@pytest.mark.parametrize("weights", [None, (0.5, 4.0)])
def test_one_class_is_binary_cross_entropy(weights: tuple[float, float] | None) -> None:
    logits, masks = pixels()
    known = masks != 255
    weight = known.double() if weights is None else known * torch.tensor(weights, dtype=torch.float64)[masks % 255]
    y = (masks == 1).double()
    entries = F.binary_cross_entropy_with_logits(logits[:, 0], y, weight, reduction="sum")
    found = segmentation(1, class_weights=weights).loss({"out": logits}, of(masks))
    torch.testing.assert_close(found, entries / weight.sum(), rtol=1e-12, atol=0)
    both = segmentation(1).loss({"out": logits, "aux": logits}, of(masks))
    torch.testing.assert_close(both, 1.5 * segmentation(1).loss(logits, of(masks)))


def test_the_iou_of_the_foreground() -> None:
    pytest.importorskip("torchmetrics")
    logits, masks = pixels()
    known = masks != 255
    said, there = (logits[:, 0] > 0) & known, masks == 1
    for classes, name in (((), "1"), (("road",), "road")):
        metric = segmentation(1, classes=classes).metric()
        metric.update(logits, masks)
        found = metric.compute()
        iou = ((said & there).sum() / (said | there).sum()).item()
        accuracy = ((said == there)[known]).double().mean().item()
        assert found == pytest.approx({"miou": iou, "pixel_accuracy": accuracy, f"iou/{name}": iou})
    score = segmentation(1).score(logits, masks)
    by_image = [((said == there) & known)[i].sum().item() / known[i].sum().item() for i in range(2)]
    assert score.tolist() == pytest.approx(by_image)


# --- any loss --------------------------------------------------------------------------------------------------------


def test_a_loss_alone_is_a_task() -> None:
    task = custom(F.huber_loss, 2)
    output, targets = torch.randn(6, 2), torch.randn(6, 2)
    loss = F.huber_loss(output, targets)
    assert torch.equal(task.loss(output, of(targets)), loss)
    torch.testing.assert_close(task.score(output, targets), torch.exp(-loss).expand(6))
    metric = task.metric()
    for rows in (slice(0, 4), slice(4, 6)):
        metric.update(output[rows], targets[rows])
    found = metric.compute()
    assert list(found) == ["score", "loss"] and found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert task.loss(output.bfloat16(), of(targets)).dtype == torch.float32
    assert task.score(output, output - 1e9).max() == 0.0


def test_what_is_given_replaces_the_defaults() -> None:
    class Fixed:
        def update(self, output: Any, targets: Any) -> None: ...

        def compute(self) -> dict[str, float]:
            return {"fixed": 0.5}

    def head(site: Any) -> torch.nn.Module:
        return torch.nn.Identity()

    task = custom(F.mse_loss, 2, score=lambda f, y: torch.ones(len(y)), metric=Fixed, head=head)
    assert task.score(torch.zeros(3, 2), torch.zeros(3, 2)).tolist() == [1.0] * 3
    assert task.metric().compute() == {"fixed": 0.5}
    proposed: Any = object()
    assert task.head(proposed) is head and custom(F.mse_loss, 2).head(proposed) is proposed


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (regression, {"num_outputs": 0}, "at least 1 output"),
        (regression, {"loss": "mae"}, "unknown loss of regression 'mae'"),
        (regression, {"std": (0.0,)}, "one positive std"),
        (multilabel, {"num_labels": 0}, "at least 1 label"),
        (multilabel, {"num_labels": 3, "pos_weight": (1.0, 2.0)}, "pos_weight has 2 entries"),
        (multilabel, {"num_labels": 2, "pos_weight": (1.0, 0.0)}, "weights are positive"),
        (multilabel, {"num_labels": 2, "classes": ("a",)}, "classes has 1 entries"),
        (segmentation, {"num_classes": 1, "class_weights": (1.0,)}, "one for each of the 2 classes"),
        (segmentation, {"num_classes": 1, "ignore_index": 1}, "one of the 2 classes of a mask"),
        (custom, {"loss": "mse", "num_outputs": 1}, "loss='mse'; a custom task takes a function"),
        (custom, {"loss": F.mse_loss, "num_outputs": 1, "metric": 3}, "metric=3"),
        (custom, {"loss": F.mse_loss, "num_outputs": 0}, "at least 1 output"),
    ],
)
def test_options_that_make_no_sense(make: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**options)
