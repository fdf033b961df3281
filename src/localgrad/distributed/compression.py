"""Features in fewer bytes on their way from one rank to the next."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Wire = Literal["same", "bf16", "int8"]


def compressed(features: Tensor, wire: Wire) -> tuple[Tensor, ...]:
    """What is sent instead of ``features`` (B, C, ...): themselves, a bfloat16 copy, or int8 values and their scales.

    ``int8`` is symmetric: one scale, in the dtype of the features, for each sample and each entry of the second
    dimension, (B, C, 1, ...), or for each sample if there is no third; the largest value there becomes 127, and values
    are rounded to the nearest. One value that is not finite makes all that share its scale NaN. Integers, and floats
    of two bytes with ``bf16``, are sent as they are.

    Example:
        >>> import torch
        >>> from localgrad.distributed.compression import compressed, restored
        >>> values, scales = compressed(torch.tensor([[[0.0, 0.5, -2.54]]]), "int8")
        >>> values.tolist()
        [[[0, 25, -127]]]
        >>> restored((values, scales), torch.float32)
        tensor([[[ 0.0000,  0.5000, -2.5400]]])
    """
    if wire == "same" or not features.is_floating_point():
        return (features,)
    if wire == "bf16":
        return (features.to(torch.bfloat16) if features.element_size() > 2 else features,)
    if features.dim() < 2 or features.numel() == 0:
        return (features,)
    largest = features.abs().amax(tuple(range(min(2, features.dim() - 1), features.dim())), keepdim=True)
    smallest = torch.finfo(features.dtype).tiny  # of a scale: else zeros would be divided by zero
    scales = torch.where(largest.isfinite(), (largest / 127).clamp_min(smallest), torch.nan)
    return (features / scales).round().to(torch.int8), scales


def restored(parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Features of ``dtype`` from what `compressed` made of them."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    values, scales = parts
    return values.to(dtype) * scales
