"""Targets that a task cannot take are refused with what was given, what is allowed and what to write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from localgrad import Batch, TrainingError
from localgrad.tasks import classification, custom, detection, multilabel, regression, segmentation

MAPS = torch.zeros(2, 3, 4, 4)
FLAT = torch.zeros(4, 3)
INTS = torch.zeros(4, dtype=torch.int64)
PIXELS = torch.zeros(2, 4, 4, dtype=torch.int64)
BOX = torch.tensor([[0.0, 0, 4, 4]])


def answer() -> dict[str, Any]:
    """As much of a detector's output as is read before targets are."""
    return {"detector": None, "cls_logits": torch.zeros(1, 5, 2), "bbox_regression": torch.zeros(1, 5, 4)}


REFUSED: list[tuple[Any, Any, Any, str]] = [  # task, output, targets, words
    (classification(3), FLAT, INTS + 3, r"classification\(3\) was given the class 3; it takes 0 to 2, and -100"),
    (classification(3), FLAT, INTS - 1, "was given the class -1"),
    (classification(3), FLAT, INTS.float(), r"targets \(4,\) of torch.float32; .*write targets.long\(\)"),
    (classification(3), FLAT, INTS.int(), r"\(4,\) of torch.int32; .*write targets.long\(\)"),
    (classification(3), FLAT, INTS[:, None], r"\(4, 1\) of torch.int64; .*targets.squeeze\(1\) for \(B, 1\)"),
    (classification(3), FLAT, INTS[:3], r"\(3,\) of torch.int64; it takes int64 class indices of shape \(4,\)"),
    (classification(3), FLAT, FLAT.long(), r"targets.float\(\) for one-hot rows"),
    (classification(3), FLAT, torch.zeros(4, 2), r"probabilities \(4, 3\)"),
    (classification(3), FLAT, [0, 1, 2, 0], "was given targets list"),
    (classification(3), FLAT, torch.tensor([[1.0, 1, 0]] * 4), r"sum up to 2 to 2; .*write tasks.multilabel\(3\)"),
    (classification(3), FLAT, FLAT, r"sum up to 0 to 0; .*write tasks.multilabel\(3\)"),
    (classification(3), FLAT, torch.tensor([[1.5, -0.5, 0]] * 4), "where several classes hold at once"),
    (classification(3), FLAT, FLAT * float("nan"), "where several classes hold at once"),
    (multilabel(3), FLAT, INTS, r"multilabel\(3\) was given targets \(4,\) of torch.int64; .*tasks.classification"),
    (multilabel(3), FLAT, FLAT.long(), r"write targets.float\(\)"),
    (multilabel(3), FLAT, FLAT + 2, r"targets from 2 to 2; it takes 0 to 1, and -1"),
    (multilabel(3), FLAT, FLAT * float("nan"), "write NaN and other marks of unknown labels as -1"),
    (multilabel(2), FLAT, FLAT, r"the model returns \(4, 3\), but multilabel\(2\) needs \(B, 2\)"),
    (segmentation(3), MAPS, PIXELS + 3, r"segmentation\(3\) was given the class 3; it takes 0 to 2, and 255"),
    (segmentation(3), MAPS, PIXELS.float(), r"\(2, 4, 4\) of torch.float32; .*write targets.long\(\)"),
    (segmentation(3), MAPS, PIXELS[:, None], r"targets.squeeze\(1\)"),
    (segmentation(3), MAPS, PIXELS[:1], "one for each of 2 images"),
    (segmentation(1), MAPS[:, :1], PIXELS + 2, r"segmentation\(1\) was given the class 2; it takes 0 to 1, and 255"),
    (segmentation(1), MAPS, PIXELS, r"segmentation\(1\) needs \(B, 1, h, w\)"),
    (regression(3), FLAT, torch.zeros(4), r"regression\(3\) was given targets \(4,\) of torch.float32; .*\(B, 3\)"),
    (regression(3), FLAT, torch.zeros(3, 3), "with B = 4"),
    (regression(3), FLAT, FLAT > 0, "torch.bool"),
    (regression(3), FLAT, FLAT / 0, "NaN or infinite"),
    (regression(), FLAT, INTS, r"the model returns \(4, 3\), but regression\(1\) needs \(B, 1\) or \(B,\)"),
    (detection(2), answer(), BOX, r"detection\(2\) was given targets \(1, 4\) .*a list of 1 mappings"),
    (detection(2), answer(), [], "was given targets list; it takes a list of 1 mappings"),
    (detection(2), answer(), [{"boxes": BOX}], "a list of 1 mappings"),
    (detection(2), answer(), [{"boxes": BOX[0], "labels": INTS[:1]}], r"boxes.reshape\(-1, 4\)"),
    (detection(2), answer(), [{"boxes": BOX, "labels": INTS}], r"labels.long\(\), one for each box"),
    (detection(2), answer(), [{"boxes": BOX, "labels": INTS[:1] + 2}], "was given the class 2; it takes 0 to 1;"),
    (detection(2), answer(), [{"boxes": BOX / 0, "labels": INTS[:1]}], "NaN or infinite"),
    (custom(lambda f, y: (f - y).square(), 3), FLAT, FLAT, r"returns \(4, 3\); .*write .mean\(\)"),
    (custom(lambda f, y: 1.0, 3), FLAT, FLAT, r"returns a float; .*write .mean\(\)"),
]


@pytest.mark.parametrize(("task", "output", "targets", "words"), REFUSED)
def test_refused(task: Any, output: Any, targets: Any, words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        task.loss(output, Batch(None, targets, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_in_low_precision_are_taken(dtype: torch.dtype) -> None:
    rows = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).softmax(1).to(dtype).float()
    assert classification(100).loss(torch.zeros(64, 100), Batch(None, rows, 0)).isfinite()


def test_values_of_tensors_without_data_are_not_asked_for() -> None:
    """On the meta device and in planning; shapes are."""

    def loss(task: Any, output: Tensor, targets: Tensor) -> None:
        task.loss(output, Batch(None, targets, 0))
        with pytest.raises(TrainingError):
            task.loss(output, Batch(None, targets[:1], 0))

    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            loss(classification(3), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
            loss(classification(3), torch.zeros(4, 3), torch.zeros(4, 3))
            loss(multilabel(3), torch.zeros(4, 3), torch.zeros(4, 3))
            loss(regression(3), torch.zeros(4, 3), torch.zeros(4, 3))
            loss(segmentation(3), torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64))
