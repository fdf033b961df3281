"""Where the channels of features are, as the layers next to them tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from localgrad.batches import tensors_in
from localgrad.layout import Layout, layout_of

Hint = Literal["first", "last"] | None
Shape = tuple[int, ...]


def channels_hint(
    behind: Sequence[tuple[nn.Module, Shape]], before: Sequence[tuple[nn.Module, Shape]], shape: Shape
) -> Hint:
    """Where the layers next to features look for channels: the first one with weights behind them, else before them.

    Where none tells, other layers may. None where still none does, or where two sides are equal and what is behind
    contradicts what is before.

    Args:
        behind: layers that run after the features are made, and the shape that each takes, the nearest first.
        before: layers that ran before, and the shape that each makes, the nearest first.
        shape: of the features.
    """
    if len(shape) < 3:
        return None
    # What looks at this very shape tells most.
    for alike, looks_for in ((True, _looks_for), (False, _looks_for), (True, _seems_to_look_for)):
        hints: list[Hint] = []
        for made, way in ((False, behind), (True, before)):
            near = (layer for layer, seen in way if (seen == shape if alike else len(seen) == len(shape)))
            told = (looks_for(layer, shape, made) for layer in near)
            hints.append(next((hint for hint in told if hint is not None), None))
        if alike and len(shape) == 3 and shape[1] == shape[2] and {"first", "last"} <= set(hints):
            return None
        if any(hints):
            return hints[0] or hints[1]
    return "last" if len(shape) == 4 and shape[1] == shape[2] != shape[3] else None


def _looks_for(module: nn.Module, shape: Shape, made: bool) -> Hint:
    """Where a layer looks for channels in features of a shape that it takes, or ``made``."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return "first"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        *outer, width = module.normalized_shape
        if outer:
            return None  # it normalises positions as well
    elif isinstance(module, (nn.Linear, nn.Embedding)):
        width = module.weight.shape[0 if isinstance(module, nn.Linear) and made else -1]
    elif isinstance(module, nn.RNNBase):
        given = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
        width = given if made else module.input_size
    elif isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
    else:
        return None
    return "last" if width == shape[-1] else "first" if len(shape) > 3 else None


_POOLS = tuple(kind for name, kind in vars(nn.modules.pooling).items() if name.startswith("_") and name.endswith("Nd"))


def _seems_to_look_for(module: nn.Module, shape: Shape, made: bool) -> Hint:
    """The same of layers that tell less, for (B, C, L) and (B, T, C): pooling, and those with weights of their own."""
    if len(shape) != 3:
        return None
    if isinstance(module, _POOLS):
        return "first"
    sides = {side for parameter in module.parameters(recurse=False) for side in parameter.shape}
    first, last = shape[1] in sides, shape[2] in sides
    return None if first == last else "first" if first else "last"


def has_positions(shape: Shape) -> bool:
    """Whether features of a shape lie at more than one place: pixels, tokens, frames."""
    if len(shape) < 4:
        return len(shape) == 3
    return any(side != 1 for side in shape[2:]) and any(side != 1 for side in shape[1:-1])


def shape_layout(shape: Shape, example: Any, hint: Hint) -> Layout:
    """The layout of features of one shape."""
    inputs = tensors_in(example)[0]
    return layout_of(inputs.new_empty((), dtype=torch.float32).expand(shape), inputs, hint)
