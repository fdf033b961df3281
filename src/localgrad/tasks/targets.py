"""Whether targets are what a task expects.

Shape, dtype and values are looked at once for all losses of a batch. On another device than the CPU a task reads the
values of its first batch alone, since that waits for the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from localgrad.errors import TrainingError

CLASSES = "write targets.long() for whole numbers, targets.squeeze(1) for (B, 1)"


def logits_of(output: Any) -> Any:
    """What a model of transformers answers, of all that it returns; any other output as it is."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def require(holds: bool, task: str, targets: Any, allowed: str, write: str) -> None:
    """Raise `TrainingError` about the form of ``targets`` unless it is one that ``task`` takes."""
    if not holds:
        form = f"{tuple(targets.shape)} of {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
        raise TrainingError(f"{task} was given targets {form}; it takes {allowed}; {write}")


def values_of(targets: Tensor, read: set[torch.device]) -> np.ndarray | None:
    """The values of ``targets``, None where they are not to be looked at; ``read`` are the devices where they were.

    In numpy, so that what looking at them takes is counted in no step.
    """
    if type(targets) is not Tensor or targets.device.type == "meta":  # planning runs on tensors without data
        return None
    if targets.device.type != "cpu":
        if targets.device in read or torch.cuda.is_current_stream_capturing():
            return None
        read.add(targets.device)
    targets = targets.detach().cpu()
    return (targets.double() if targets.dtype == torch.bfloat16 else targets).numpy()


def check_classes(values: np.ndarray | None, num_classes: int, ignored: int | None, task: str) -> None:
    """Raise `TrainingError` unless class indices are below ``num_classes`` and not negative, or ``ignored``."""
    if values is None:
        return
    wrong = (values < 0) | (values >= num_classes)
    if ignored is not None:
        wrong &= values != ignored
    if wrong.any():
        found = ", ".join(map(str, np.unique(values[wrong])[:5].tolist()))
        allowed = f"0 to {num_classes - 1}" + f", and {ignored} for what is ignored" * (ignored is not None)
        raise TrainingError(
            f"{task} was given the class {found}; it takes {allowed}; write the labels so, or a task with more classes"
        )


def check_finite(values: np.ndarray | None, task: str) -> None:
    """Raise `TrainingError` unless targets are numbers."""
    if values is not None and not np.isfinite(values).all():
        raise TrainingError(f"{task} was given targets that are NaN or infinite; leave such samples out")
