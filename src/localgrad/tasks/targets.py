"""Whether targets are what a task expects.

Shape and dtype are looked at in every loss. Values are read in every loss on the CPU. On another device a task reads
those of its first batch alone, since that waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from localgrad.errors import TrainingError

CLASSES = "write targets.long() for whole numbers, targets.squeeze(1) for (B, 1)"


def require(holds: bool, task: str, targets: Any, allowed: str, write: str) -> None:
    """Raise `TrainingError` about the form of ``targets`` unless it is one that ``task`` takes."""
    if not holds:
        form = f"{tuple(targets.shape)} of {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
        raise TrainingError(f"{task} was given targets {form}; it takes {allowed}; {write}")


def has_values(targets: Tensor, read: set[torch.device]) -> bool:
    """Whether the values of ``targets`` are to be looked at; ``read`` are the devices where they were."""
    if type(targets) is not Tensor or targets.device.type in ("cpu", "meta"):  # planning runs on tensors without data
        return type(targets) is Tensor and targets.device.type == "cpu"
    if targets.device in read or torch.cuda.is_current_stream_capturing():
        return False
    read.add(targets.device)
    return True


def check_classes(targets: Tensor, num_classes: int, ignored: int | None, task: str) -> None:
    """Raise `TrainingError` unless class indices are below ``num_classes`` and not negative, or ``ignored``."""
    wrong = (targets < 0) | (targets >= num_classes)
    if ignored is not None:
        wrong &= targets != ignored
    if wrong.any():
        found = ", ".join(map(str, targets[wrong].unique()[:5].tolist()))
        allowed = f"0 to {num_classes - 1}" + f", and {ignored} for what is ignored" * (ignored is not None)
        raise TrainingError(
            f"{task} was given the class {found}; it takes {allowed}; write the labels so, or a task with more classes"
        )


def check_finite(targets: Tensor, task: str) -> None:
    """Raise `TrainingError` unless targets are numbers."""
    if not targets.isfinite().all():
        raise TrainingError(f"{task} was given targets that are NaN or infinite; leave such samples out")
