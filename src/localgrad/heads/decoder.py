"""From features back to the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localgrad.layout import ToMaps
from localgrad.site import Site


@dataclass(frozen=True)
class Decoder:
    """Bilinear upsampling to the image size, 3x3 convolution to ``width``, BatchNorm, ReLU, 3x3 convolution.

    The output are logits of the pixels in [0, 1], (B, image channels, H, W), for `localgrad.losses.Reconstruction`.

    Args:
        width: inner channels.
        scale: share of the image's sides at which it decodes; less than 1 costs less.

    Source: Wang et al., InfoPro, ICLR 2021, arXiv:2101.10832, released CIFAR decoder.
    Differs: no sigmoid, which the loss contains (same value, stable gradient); ``scale`` is ours.
    """

    width: int = 12
    scale: float = 1.0

    def __call__(self, site: Site) -> nn.Module:
        channels, height, width = site.inputs.shape[1:4]
        size = (max(1, round(height * self.scale)), max(1, round(width * self.scale)))
        decoder = nn.Sequential(
            nn.Conv2d(site.channels, self.width, 3, padding=1),
            nn.BatchNorm2d(self.width),
            nn.ReLU(inplace=True),
            nn.Conv2d(self.width, channels, 3, padding=1),
        )
        if site.layout.grid == size:
            return nn.Sequential(ToMaps(site.layout), *decoder)
        # Resized maps are made anew, and in this memory format what follows takes half the time on a CPU.
        decoder.to(memory_format=torch.channels_last)
        return nn.Sequential(ToMaps(site.layout), Resize(size), *decoder)


class Resize(nn.Module):
    """(B, C, h, w) to (B, C, *size), bilinear with aligned corners."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        maps = maps.contiguous(memory_format=torch.channels_last)
        return F.interpolate(maps, size=self.size, mode="bilinear", align_corners=True)
