"""How well the image can be read back from features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.losses.precision import widened
from localgrad.task import Batch, Task


@dataclass(frozen=True)
class Reconstruction:
    """Mean binary cross-entropy between decoded pixels and the image in [0, 1].

    ``-mean(x * log(p) + (1 - x) * log(1 - p))`` with ``p = sigmoid(output)``. A decoder at a smaller scale is compared
    with the image averaged to its size.

    Args:
        task: knows how to undo the normalisation of its inputs.

    Source: Wang et al., InfoPro, ICLR 2021, arXiv:2101.10832, section 3.3 and released code.
    """

    task: Task
    reads_inputs: ClassVar[bool] = True

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            pixels = self.task.pixels(batch.inputs)
            if pixels.shape[2:] != output.shape[2:]:
                pixels = F.interpolate(pixels, size=output.shape[2:], mode="area")
        logits = widened(output)
        return F.binary_cross_entropy_with_logits(logits, pixels.to(logits.dtype))
