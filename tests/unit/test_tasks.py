"""Classification: loss, score, pixels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from localgrad import Batch, ConfigError, TrainingError
from localgrad.tasks import classification


def given(targets: torch.Tensor) -> Batch:
    return Batch(None, targets, 0)


def test_loss_by_hand() -> None:
    logits, targets = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0]]), torch.tensor([1, 0])
    probability = logits.exp() / logits.exp().sum(1, keepdim=True)
    by_hand = -(probability[0, 1].log() + probability[1, 0].log()) / 2
    torch.testing.assert_close(classification(3).loss(logits, given(targets)), by_hand)
    smoothed = classification(3, label_smoothing=0.3).loss(logits, given(targets))
    spread = -probability.log().mean(1).mean()
    torch.testing.assert_close(smoothed, 0.7 * by_hand + 0.3 * spread)


def test_mixed_targets() -> None:
    logits, hard = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    soft = F.one_hot(hard, 3).float()
    task = classification(3)
    torch.testing.assert_close(task.loss(logits, given(soft)), task.loss(logits, given(hard)))
    mixed = 0.7 * soft + 0.3 * soft.flip(0)
    expected = -(mixed * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task.loss(logits, given(mixed)), expected)
    assert torch.equal(task.score(logits, mixed), task.score(logits, hard))


@pytest.mark.parametrize(
    "given_dtype, loss_dtype",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64,) * 2,
    ],
)
def test_the_loss_is_never_in_half_precision_and_never_less_precise(
    given_dtype: torch.dtype, loss_dtype: torch.dtype
) -> None:
    logits = torch.randn(4, 3).to(given_dtype)
    loss = classification(3).loss(logits, given(torch.tensor([0, 1, 2, 0])))
    assert loss.dtype == loss_dtype
    assert torch.equal(loss, F.cross_entropy(logits.to(loss_dtype), torch.tensor([0, 1, 2, 0])))


def test_score() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    score = classification(2).score(logits, torch.tensor([1, 1, 1]))
    assert score.tolist() == [1.0, 0.0, 1.0] and score.dtype == torch.float32


def test_samples_whose_label_is_ignored_count_nowhere() -> None:
    task, logits = classification(2), torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([1, -100, 0, 1])
    assert task.score(logits, labels).tolist() == [1.0, 1.0, 0.0, 1.0]
    metric = task.metric()
    metric.update(logits[:2], labels[:2])
    metric.update(logits[2:], labels[2:])
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_undo_the_normalisation_and_stay_in_range(dtype: torch.dtype) -> None:
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    image = torch.rand(2, 3, 4, 4, dtype=dtype)
    image[0, :, 0, 0], image[0, :, 0, 1] = 0.0, 1.0
    shift, scale = (torch.tensor(v, dtype=dtype)[:, None, None] for v in (mean, std))
    pixels = classification(3, mean=mean, std=std).pixels((image - shift) / scale)
    torch.testing.assert_close(pixels, image)
    assert pixels.dtype == dtype and pixels.min() >= 0 and pixels.max() <= 1
    beyond = classification(3, mean=mean, std=std).pixels(torch.full((1, 3, 1, 1), 9.0, dtype=dtype))
    assert (beyond == 1).all()


def test_refuses() -> None:
    for options in (
        {"num_classes": 1},
        {"num_classes": 3, "label_smoothing": 1.0},
        {"num_classes": 3, "label_smoothing": -0.1},
        {"num_classes": 3, "mean": (0.5,), "std": (0.5, 0.5)},
        {"num_classes": 3, "mean": (0.5,), "std": (0.0,)},
    ):
        with pytest.raises(ConfigError):
            classification(**options)
    for shape in ((4, 5), (4, 3, 2), (4,)):
        with pytest.raises(TrainingError, match=r"classification\(3\) needs"):
            classification(3).loss(torch.zeros(shape), given(torch.zeros(4, dtype=torch.long)))
