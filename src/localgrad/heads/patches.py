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

    Patches run as one larger batch, so BatchNorm sees all of them at once; heads that are not ``shared`` see one each.
    Where a side does not divide, the largest smaller count that does is used.

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
        sides = (*site.layout.grid, *site.inputs.shape[-2:]) if site.inputs.dim() == 4 else (1,)
        count = next(n for n in range(self.count, 0, -1) if all(side % n == 0 for side in sides))
        with torch.no_grad():
            maps = to_maps(site.features)
        if count == 1:
            return self.head(site)
        inner = replace(
            site,
            features=_split(maps, count)[: len(maps)],
            inputs=_split(site.inputs, count)[: len(maps)],
            cut=replace(site.cut, channels_hint="first"),
            patches=site.patches * count,
        )
        made = [self.head(inner) for _ in range(1 if self.shared else count**2)]
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
        n = self.count
        if isinstance(self.head, JoinsPatches):
            return self.head.joined(answers, n)
        if answers.dim() == 2:
            return answers.unflatten(0, (-1, n * n)).mean(1)
        if _is_channels_last(answers):
            rows = answers.permute(0, 2, 3, 1).unflatten(0, (-1, n, n))  # B, row, column, h, w, C
            return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        rows = answers.unflatten(0, (-1, n, n))  # B, row, column, C, h, w
        return rows.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _split(maps: Tensor, count: int) -> Tensor:
    """Maps (B, C, H, W) as patches (B * count ** 2, C, H / count, W / count), row by row, in their memory format."""
    height, width = maps.shape[2] // count, maps.shape[3] // count
    if _is_channels_last(maps):
        last = maps.permute(0, 2, 3, 1).unflatten(1, (count, height)).unflatten(3, (count, width))
        return last.transpose(2, 3).flatten(0, 2).permute(0, 3, 1, 2)
    patches = maps.unflatten(2, (count, height)).unflatten(4, (count, width))  # B, C, row, h, column, w
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _is_channels_last(maps: Tensor) -> bool:
    return maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
