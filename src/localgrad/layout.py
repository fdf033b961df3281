"""Where channels and positions lie in a feature tensor, and how to bring it into one form that every head reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from localgrad.errors import MethodError, PartitionError

Kind = Literal["maps", "channels_last", "tokens", "vector"]
MAX_PREFIX_TOKENS = 8


@dataclass(frozen=True)
class Layout:
    """The form of features.

    Args:
        kind: ``maps`` (B, C, H, W), ``channels_last`` (B, H, W, C), ``tokens`` (B, T, C) or ``vector`` (B, C); maps
            also as signals (B, C, L) and volumes (B, C, D, H, W), the latter with channels last too.
        channels: C.
        grid: (H, W), or (D, H, W); (L, 1) for signals; for tokens the grid their positions form, or (T, 1) if they form
            none.
        prefix: tokens in front of the grid (class and register tokens).
    """

    kind: Kind
    channels: int
    grid: tuple[int, ...]
    prefix: int = 0


def layout_of(features: Tensor, inputs: Tensor, channels_hint: Literal["first", "last"] | None = None) -> Layout:
    """Read the layout off an example.

    Args:
        features: (B, C, H, W), (B, H, W, C), (B, T, C), (B, C, L), (B, C), (B, C, D, H, W) or (B, D, H, W, C).
        inputs: the images they came from, (B, C, H, W): their aspect ratio says how tokens form a grid.
        channels_hint: where the neighbouring layers with weights look for channels; without it features of three
            dimensions are tokens, those of more are maps.

    Raises:
        PartitionError: for features with another number of dimensions.
    """
    shape = tuple(features.shape)
    if len(shape) == 2:
        return Layout("vector", shape[1], (1, 1))
    if len(shape) == 3 and channels_hint == "first":
        return Layout("maps", shape[1], (shape[2], 1))
    if len(shape) == 3:
        if inputs.dim() < 4:  # a sequence, not an image
            return Layout("tokens", shape[2], (shape[1], 1))
        return Layout("tokens", shape[2], *_token_grid(shape[1], inputs.shape[-2] / inputs.shape[-1]))
    if len(shape) in (4, 5):
        if channels_hint == "last":
            return Layout("channels_last", shape[-1], shape[1:-1])
        return Layout("maps", shape[1], shape[2:])
    raise PartitionError(
        f"features of shape {shape} at a boundary: heads read (B, C, H, W), (B, H, W, C), (B, T, C), (B, C, L), "
        "(B, C, D, H, W) or (B, C); cut the model elsewhere"
    )


def _token_grid(tokens: int, ratio: float) -> tuple[tuple[int, int], int]:
    for prefix in range(min(MAX_PREFIX_TOKENS, tokens - 1) + 1):
        height = round(math.sqrt((tokens - prefix) * ratio))
        if height > 0 and (tokens - prefix) % height == 0:
            width = (tokens - prefix) // height
            if abs(height / width - ratio) < 1e-6 * ratio:
                return (height, width), prefix
    return (tokens, 1), 0


class ToMaps(nn.Module):
    """Features of any layout as maps ``(B, C, H, W)``; prefix tokens are left out, signals are maps of width 1.

    Args:
        layout: of the features.
        volumes: whether what follows reads ``(B, C, D, H, W)`` too.

    Raises:
        MethodError: for features of volumes where only maps are read.
    """

    def __init__(self, layout: Layout, volumes: bool = False) -> None:
        super().__init__()
        if len(layout.grid) > 2 and not volumes:
            raise MethodError(
                f"this head reads maps, but the features are volumes on a grid {layout.grid}; use a linear or mlp head"
            )
        self.layout = layout

    def forward(self, features: Tensor) -> Tensor:
        layout = self.layout
        if layout.kind == "maps":
            return features[..., None] if features.dim() == 3 else features
        if layout.kind == "channels_last":
            return features.movedim(-1, 1)
        if layout.kind == "tokens":
            return features[:, layout.prefix :].transpose(1, 2).unflatten(2, layout.grid)
        return features[:, :, None, None]


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
