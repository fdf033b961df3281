"""From features back to the image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from localgrad.errors import MethodError
from localgrad.layout import LAYERS, ToMaps
from localgrad.site import Site


@dataclass(frozen=True)
class Decoder:
    """Bilinear upsampling to the image size, 3x3 convolution to ``width``, BatchNorm, ReLU, 3x3 convolution.

    The output are logits of the pixels in [0, 1], (B, image channels, H, W), for `localgrad.losses.Reconstruction`.
    Inputs may be signals (B, C, L) or volumes (B, C, D, H, W) as well, whose layers are those of that dimension.

    Args:
        width: inner channels.
        scale: share of the image's sides at which it decodes; less than 1 costs less.

    Raises:
        MethodError: where features and inputs differ in the number of sides, so that no position has its pixels.

    Source: Wang et al., InfoPro, ICLR 2021, arXiv:2101.10832, released CIFAR decoder.
    Differs: no sigmoid, which the loss contains (same value, stable gradient); ``scale`` is ours.
    """

    width: int = 12
    scale: float = 1.0

    def __call__(self, site: Site) -> nn.Module:
        by = site.layout.layers
        channels, size = target(site, self.scale)
        decoder = nn.Sequential(
            by.conv(site.channels, self.width, 3, padding=1),
            by.batch_norm(self.width),
            nn.ReLU(inplace=True),
            by.conv(self.width, channels, 3, padding=1),
        )
        if site.layout.grid == size:
            return nn.Sequential(ToMaps(site.layout), *decoder)
        # Resized maps are made anew, and in this memory format what follows takes half the time on a CPU.
        decoder.to(memory_format=by.memory_format)
        return nn.Sequential(ToMaps(site.layout), Resize(size), *decoder)


def target(site: Site, scale: float) -> tuple[int, tuple[int, ...]]:
    """Channels and sides of what a decoder makes: the inputs, at a share of their sides.

    Raises:
        MethodError: features and inputs differ in the number of sides.
    """
    channels, *sides = site.inputs.shape[1:] or (0,)
    if len(sides) != len(site.layout.grid):
        raise MethodError(
            f"after block {site.span.stop - 1} features of shape {tuple(site.features.shape)} lie on a grid "
            f"{site.layout.grid}, but the inputs have the shape {tuple(site.inputs.shape)}, so no decoder knows where "
            "their positions lie; use a method without reconstruction, such as dgl, or a decoder of your own, "
            "infopro(task, decoder=builder)"
        )
    return channels, tuple(max(1, round(side * scale)) for side in sides)


class Resize(nn.Module):
    """(B, C, h, w) to (B, C, *size), bilinear with aligned corners; signals and volumes likewise."""

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        by = LAYERS[len(self.size)]
        maps = maps.contiguous(memory_format=by.memory_format)
        return F.interpolate(maps, size=self.size, mode=by.resize, align_corners=True)
