"""From what a network reads back to pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from localgrad.errors import ConfigError


def check_normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Raise `ConfigError` unless there is one mean and one positive std for each channel."""
    if len(mean) != len(std) or not all(s > 0 for s in std):
        raise ConfigError(f"mean={mean}, std={std}; give one mean and one positive std for each channel")


def pixels_of(inputs: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``inputs * std + mean``, (B, C, H, W), limited to [0, 1] because augmentation may leave it by rounding.

    Signals (B, C, L) and volumes (B, C, D, H, W) likewise; a signal in [-1, 1] has mean and std 0.5.
    """
    sides = [1] * (inputs.dim() - 2)
    shift = torch.tensor(mean, device=inputs.device, dtype=inputs.dtype).reshape(-1, *sides)
    scale = torch.tensor(std, device=inputs.device, dtype=inputs.dtype).reshape(-1, *sides)
    return (inputs * scale + shift).clamp(0.0, 1.0)
