"""From stored uint8 images to what a network reads: per-image random crop and flip, normalisation, resizing."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from localgrad import randomness


@dataclass(frozen=True)
class Crop:
    """Pad by ``pad`` pixels, crop back to the old size at a random place, then mirror half of the images.

    Written out here because ``torchvision.transforms.v2`` draws one place and one flip for a whole batch, while this
    draws them for each image. Padding mirrors the border pixels (``reflect``, the border itself not repeated) or is
    zero (black). Nothing is padded in memory: the crop reads each pixel straight from where it comes from.

    Source: the CIFAR-10, SVHN and STL-10 recipes of Wang et al., Revisiting Locally Supervised Learning (InfoPro),
    ICLR 2021, arXiv:2101.10832.
    Differs: nothing known.
    """

    pad: int
    reflect: bool = False
    flip: bool = True

    def draw(self, count: int, *key: randomness.Part) -> Tensor:
        """Down shift, right shift (pixels, 0 .. 2 * pad) and flip (0 or 1) of ``count`` images: (count, 3) int64."""
        generator = randomness.generator(*key)
        shifts = torch.randint(0, 2 * self.pad + 1, (count, 2), generator=generator)
        flips = torch.randint(0, 1 + self.flip, (count, 1), generator=generator)
        return torch.cat([shifts, flips], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Apply ``draws`` (B, 3) to ``images`` (B, C, H, W); same shape and type."""
        height, width = images.shape[2:]
        down, right, flip = draws.to(images.device).T
        rows = torch.arange(height, device=images.device) + down[:, None] - self.pad
        columns = torch.arange(width, device=images.device) + right[:, None] - self.pad
        columns = torch.where(flip[:, None] == 1, columns.flip(1), columns)
        rows, columns = rows[:, None, :, None], columns[:, None, None, :]
        source_rows, source_columns = _reflect(rows, height), _reflect(columns, width)
        cropped = images.gather(2, source_rows.expand_as(images)).gather(3, source_columns.expand_as(images))
        return cropped if self.reflect else cropped * ((rows == source_rows) & (columns == source_columns))


def _reflect(index: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - index.abs()).abs()


@dataclass(frozen=True)
class Normalise:
    """``(images / peak - mean) / std`` channel by channel; ``mean`` and ``std`` in units of [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    peak: int = 255

    def __call__(self, images: Tensor) -> Tensor:
        """``images`` uint8 (B, C, H, W) with values 0 .. peak; returns float32 of the same shape."""
        mean, std = (_per_channel(values, images.device) for values in (self.mean, self.std))
        return images.to(torch.float32).div_(self.peak).sub_(mean).div_(std)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, 1, 1)


def resize(images: Tensor, size: int, peak: int = 255) -> Tensor:
    """Bilinear, antialiased resize of uint8 ``images`` (N, C, H, W), 0 .. peak, to (N, C, size, size), 0 .. 255."""
    resized = images.new_empty(len(images), images.shape[1], size, size)
    for old, new in zip(images.split(1024), resized.split(1024), strict=True):
        scaled = old.to(torch.float32) * (255 / peak)
        new.copy_(F.interpolate(scaled, size=(size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255))
    return resized
