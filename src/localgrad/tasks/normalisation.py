"""From what a network reads back to pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from localgrad.errors import ConfigError


def check_normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Raise `ConfigError` unless there is one mean and one positive std for each channel."""
    if len(mean) != len(std) or not all(s > 0 for s in std):
        raise ConfigError(f"mean={mean}, std={std}; give one mean and one positive std for each channel")


_CONSTANTS: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}


def constant(row: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``row`` on a device, made once: CUDA waits for a copy from the host, and records none as a graph."""
    key = (row, dtype, device)
    if key not in _CONSTANTS:
        with torch.inference_mode(False):
            made = torch.tensor(row, dtype=dtype, device=device)
        if type(made) is not Tensor:  # of somebody's mode, outside of which it means nothing
            return made
        _CONSTANTS[key] = made
    return _CONSTANTS[key]


def pixels_of(inputs: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``inputs * std + mean``, (B, C, H, W), limited to [0, 1] because augmentation may leave it by rounding.

    Signals (B, C, L) and volumes (B, C, D, H, W) likewise; a signal in [-1, 1] has mean and std 0.5.
    """
    sides = [1] * (inputs.dim() - 2)
    shift, scale = (constant(row, inputs.dtype, inputs.device).reshape(-1, *sides) for row in (mean, std))
    return (inputs * scale + shift).clamp(0.0, 1.0)
