"""Patch feature fusion: a head that reads the features patch by patch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from localgrad.errors import MethodError
from localgrad.layout import ToMaps
from localgrad.site import HeadBuilder, Site


@dataclass(frozen=True)
class Patches:
    """One head for ``count x count`` patches of the features; vectors are averaged, maps are put together again.

    Signals are cut into ``count`` patches, volumes into ``count ** 3``. Features that have not as many sides as the
    inputs, such as words, stay whole. Patches run as one larger batch, so BatchNorm sees all of them at once; heads
    that are not ``shared`` see one each. Where a side does not divide, the largest smaller count that does is used.

    Args:
        head: builds the head for one patch of the features, and of the image.
        count: patches along each side.
        shared: one head for all patches, or else one for each.

    Source: Su et al., HPFF, ECCV 2024, arXiv:2407.05638: the auxiliary network reads n x n patches, its outputs are
    averaged. Differs: released code splits the reconstruction only, with a decoder of its own for each quadrant, which
    is ``shared=False``.
    """

    head: HeadBuilder
    count: int = 2
    shared: bool = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise MethodError(f"patches={self.count}; at least 1 patch along each side")

    def __call__(self, site: Site) -> nn.Module:
        to_maps = ToMaps(site.layout)
        grid, outer = site.layout.grid, site.inputs.shape[2:]
        sides = (*grid, *outer) if len(grid) == len(outer) else (1,)
        count = next(n for n in range(self.count, 0, -1) if all(side % n == 0 for side in sides))
        with torch.no_grad():
            maps = to_maps(site.features)
        if count == 1:
            return self.head(site)
        inner = replace(
            site,
            features=_split(maps, count)[: len(maps)],
            inputs=_split(site.inputs, count)[: len(maps)],
            cut=replace(site.cut, shape=tuple(maps.shape), channels_hint="first"),
            patches=site.patches * count,
        )
        made = [self.head(inner) for _ in range(1 if self.shared else count ** len(grid))]
        return nn.Sequential(to_maps, _Patched(made[0] if self.shared else _Apart(made), count))


@runtime_checkable
class JoinsPatches(Protocol):
    """A head whose answers are neither vectors nor maps."""

    def joined(self, answers: Any, count: int) -> Any:
        """Answers for ``count x count`` patches of each image, row by row, as those for whole images."""


class _Apart(nn.Module):
    """A head of its own for each patch of an image."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, patches: Tensor) -> Tensor:
        each = patches.unflatten(0, (-1, len(self.heads))).unbind(1)
        return torch.stack([head(patch) for head, patch in zip(self.heads, each, strict=True)], 1).flatten(0, 1)


class _Patched(nn.Module):
    def __init__(self, head: nn.Module, count: int) -> None:
        super().__init__()
        self.head, self.count = head, count

    def forward(self, maps: Tensor) -> Any:
        answers = self.head(_split(maps, self.count))
        if isinstance(self.head, JoinsPatches):
            return self.head.joined(answers, self.count)
        if answers.dim() == 2:
            return answers.unflatten(0, (len(maps), -1)).mean(1)
        return _put_together(answers, self.count)


def _split(maps: Tensor, count: int) -> Tensor:
    """Maps (B, C, H, W) as patches (B * count ** 2, C, H / count, W / count), row by row, in their memory format.

    Signals and volumes likewise.
    """
    sides, last = maps.dim() - 2, _is_channels_last(maps)
    values, first = (maps.movedim(1, -1), 1) if last else (maps, 2)
    rows = range(first, first + 2 * sides, 2)
    for row in rows:  # B, C, row, h, column, w
        values = values.unflatten(row, (count, -1))
    patches = values.movedim(tuple(rows), tuple(range(1, 1 + sides))).flatten(0, sides)
    return patches.movedim(-1, 1) if last else patches


def _put_together(patches: Tensor, count: int) -> Tensor:
    """The inverse of `_split`, for maps that a head has made of each patch."""
    sides, last = patches.dim() - 2, _is_channels_last(patches)
    values, first = (patches.movedim(1, -1), 1) if last else (patches, 2)
    rows = range(first, first + 2 * sides, 2)
    values = values.unflatten(0, (-1, *[count] * sides)).movedim(tuple(range(1, 1 + sides)), tuple(rows))
    for side in range(first, first + sides):  # B, C, row, h, column, w
        values = values.flatten(side, side + 1)
    return values.movedim(-1, 1) if last else values


def _is_channels_last(maps: Tensor) -> bool:
    return maps.movedim(1, -1).is_contiguous() and not maps.is_contiguous()
