"""The precision in which losses are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(values: Tensor) -> Tensor:
    """``values`` in float32 if they are half precision (autocast), else as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
