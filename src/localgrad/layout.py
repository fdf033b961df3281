"""Where channels and positions lie in a feature tensor, and how to bring it into one form that every head reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from localgrad.errors import PartitionError

Kind = Literal["maps", "channels_last", "tokens", "vector"]
MAX_PREFIX_TOKENS = 8


class Layers(NamedTuple):
    """The layers for positions on a line, in a plane or in space, how such maps are resized, and how they lie in memory
    where they are made anew.
    """

    conv: Callable[..., nn.Module]
    batch_norm: Callable[..., nn.Module]
    adaptive_pool: Callable[..., nn.Module]
    average_pool: Callable[..., nn.Module]
    resize: str
    memory_format: torch.memory_format


LAYERS = {
    1: Layers(nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d, nn.AvgPool1d, "linear", torch.contiguous_format),
    2: Layers(nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d, nn.AvgPool2d, "bilinear", torch.channels_last),
    3: Layers(nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d, nn.AvgPool3d, "trilinear", torch.channels_last_3d),
}


@dataclass(frozen=True)
class Layout:
    """The form of features.

    Args:
        kind: ``maps`` (B, C, H, W), ``channels_last`` (B, H, W, C), ``tokens`` (B, T, C) or ``vector`` (B, C); maps
            also as signals (B, C, L) and volumes (B, C, D, H, W), the latter with channels last too.
        channels: C.
        grid: (H, W), (L,) for signals, (D, H, W) for volumes; for tokens the grid that their positions form, or (T,) if
            they form none; for vectors a single position, with as many sides as the inputs have.
        prefix: tokens in front of the grid (class and register tokens).
    """

    kind: Kind
    channels: int
    grid: tuple[int, ...]
    prefix: int = 0

    @property
    def layers(self) -> Layers:
        """The layers that read such features once `ToMaps` has brought them into form."""
        return LAYERS[len(self.grid)]


def layout_of(features: Tensor, inputs: Tensor, channels_hint: Literal["first", "last"] | None = None) -> Layout:
    """Read the layout off an example.

    Args:
        features: (B, C, H, W), (B, H, W, C), (B, T, C), (B, C, L), (B, C), (B, C, D, H, W) or (B, D, H, W, C).
        inputs: what they came from; the aspect ratio of images (B, C, H, W) says how tokens form a grid.
        channels_hint: where the neighbouring layers look for channels; without it features of three dimensions are
            tokens, those of more are maps.

    Raises:
        PartitionError: for features with another number of dimensions.
    """
    shape = tuple(features.shape)
    if len(shape) == 2:
        sides = inputs.dim() - 2
        return Layout("vector", shape[1], (1,) * (sides if sides in LAYERS else 2))
    if len(shape) == 3 and channels_hint != "first":
        if inputs.dim() != 4:  # a sequence, or a video, whose tokens form more than one grid
            return Layout("tokens", shape[2], (shape[1],))
        return Layout("tokens", shape[2], *_token_grid(shape[1], inputs.shape[-2] / inputs.shape[-1]))
    if len(shape) in (3, 4, 5):
        if channels_hint == "last":
            return Layout("channels_last", shape[-1], shape[1:-1])
        return Layout("maps", shape[1], shape[2:])
    raise PartitionError(
        f"features of shape {shape} at a boundary: heads read (B, C, H, W), (B, H, W, C), (B, T, C), (B, C, L), "
        "(B, C, D, H, W), (B, D, H, W, C) or (B, C); cut the model elsewhere"
    )


def _token_grid(tokens: int, ratio: float) -> tuple[tuple[int, ...], int]:
    for prefix in range(min(MAX_PREFIX_TOKENS, tokens - 1) + 1):
        height = round(math.sqrt((tokens - prefix) * ratio))
        if height > 0 and (tokens - prefix) % height == 0:
            width = (tokens - prefix) // height
            if abs(height / width - ratio) < 1e-6 * ratio:
                return (height, width), prefix
    return (tokens,), 0


class ToMaps(nn.Module):
    """Features of any layout as ``(B, C, *grid)``, (B, C, H, W) for maps; prefix tokens are left out."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, features: Tensor) -> Tensor:
        layout = self.layout
        if layout.kind == "maps":
            return features
        if layout.kind == "channels_last":
            return features.movedim(-1, 1)
        if layout.kind == "tokens":
            line = features[:, layout.prefix :].transpose(1, 2)
            return line if len(layout.grid) == 1 else line.unflatten(2, layout.grid)  # sequences may have any length
        return features.reshape(*features.shape, *layout.grid)


class Pool(nn.Module):
    """Features of any layout as ``(B, C)``: the class token where there is one, else the mean over positions."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, features: Tensor) -> Tensor:
        layout = self.layout
        if layout.kind == "maps":
            return features.mean(tuple(range(2, features.dim())))
        if layout.kind == "channels_last":
            return features.mean(tuple(range(1, features.dim() - 1)))
        if layout.kind == "tokens":
            return features[:, 0] if layout.prefix else features.mean(1)
        return features
