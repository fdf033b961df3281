"""The heads of InfoPro and MLAAN for networks that read large images, ResNets on ImageNet above all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from localgrad.heads.decoder import Resize, target
from localgrad.layout import Layers, ToMaps
from localgrad.site import Site


def _convolution(
    by: Layers, inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = False
) -> list[nn.Module]:
    """A convolution that keeps the grid (or halves it), BatchNorm, ReLU."""
    return [
        by.conv(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=bias),
        by.batch_norm(outputs),
        nn.ReLU(inplace=True),
    ]


def _pooled_linear(by: Layers, inputs: int, outputs: int) -> list[nn.Module]:
    return [by.adaptive_pool(1), nn.Flatten(), nn.Linear(inputs, outputs)]


@dataclass(frozen=True)
class Classifier:
    """A short network to the width of the model's own last features: 1x1, two 3x3 of stride 2, 1x1; pooling, linear.

    With C channels at the site and F in the model's last features the convolutions have ``a = max(F/16, C/4)``,
    ``b = max(F/8, a)``, ``c = max(F/4, b)`` and F channels, each with BatchNorm and ReLU.

    Args:
        outputs: width of the linear layer: classes, or dimensions of an embedding.

    Source: Wang et al., InfoPro, ICLR 2021, arXiv:2101.10832, and HPFF, released ImageNet heads.
    Differs: a rule instead of a table; with F = 2048 equal to it for 256, 512 and 1024 channels, the only ones it has.
    """

    outputs: int

    def __call__(self, site: Site) -> nn.Module:
        final = site.final_channels
        first = max(1, final // 16, site.channels // 4)
        second = max(first, final // 8)
        third = max(second, final // 4)
        by = site.layout.layers
        return nn.Sequential(
            ToMaps(site.layout),
            *_convolution(by, site.channels, first, 1),
            *_convolution(by, first, second, 3, stride=2),
            *_convolution(by, second, third, 3, stride=2),
            *_convolution(by, third, final, 1),
            *_pooled_linear(by, final, self.outputs),
        )


@dataclass(frozen=True)
class Decoder:
    """From features back to the image by steps of 2: 1x1 convolutions up to an eighth of its sides, then 3x3 ones.

    n 1x1 convolutions (1 for features of at least an eighth of the image's sides, 2 for a sixteenth, ...) have
    ``64 (n + 1)``, ..., 128, 64 channels; 3x3 convolutions have 32 at a quarter, 12 at half and the image's own
    channels at all of its sides. Bilinear upsampling between them, BatchNorm and ReLU after all but the last. The
    output are logits of the pixels, see `localgrad.heads.Decoder`.

    Args:
        scale: share of the image's sides at which it ends; less than 1 costs less.

    Source: Wang et al., InfoPro, ICLR 2021, arXiv:2101.10832, released ImageNet decoders.
    Differs: sizes follow the image instead of 224 pixels and widths a rule instead of a table, equal to it for 28 and
    14 of 224 pixels (512 and 1024 channels); no sigmoid, which the loss contains; convolutions have a bias as in the
    CIFAR decoder, where nothing is said; ``scale`` is ours.
    """

    scale: float = 1.0

    def __call__(self, site: Site) -> nn.Module:
        by, grid = site.layout.layers, site.layout.grid
        channels, image = target(site, self.scale)
        ratio = max(side / own for side, own in zip(image, grid, strict=True))
        squeezes = 1 + max(0, math.ceil(math.log2(ratio / 8)))
        widths = [64 * (squeezes + 1), *(64 * 2**k for k in reversed(range(squeezes - 1)))]
        layers: list[nn.Module] = [ToMaps(site.layout)]
        width = site.channels
        for k, wider in enumerate(widths):
            if k > 0:
                layers.append(_up(image, grid, 8 * 2 ** (squeezes - 1 - k)))
            layers += _convolution(by, width, wider, 1, bias=True)
            width = wider
        for divisor, narrower in ((4, 32), (2, 12)):
            layers += [_up(image, grid, divisor), *_convolution(by, width, narrower, 3, bias=True)]
            width = narrower
        return nn.Sequential(*layers, Resize(image), by.conv(width, channels, 3, padding=1))


def _up(image: Sequence[int], grid: Sequence[int], divisor: int) -> Resize:
    """To a share of the image, but not below the features' own grid unless the image itself is smaller."""
    sides = zip(image, grid, strict=True)
    return Resize(tuple(min(side, max(own, math.ceil(side / divisor))) for side, own in sides))


@dataclass(frozen=True)
class Pointwise:
    """Two 1x1 convolutions, to twice the channels and back, where the features are narrow; pooling, linear.

    Narrow is at most a quarter of the width of the model's last features; wider ones go straight to the pooling.

    Args:
        outputs: width of the linear layer.

    Source: MLAAN, AAAI 2025, arXiv:2406.16633, released heads for ResNet-34 on ImageNet.
    Differs: a rule instead of a table; equal to it for 64 to 512 channels of ResNet-34.
    """

    outputs: int

    def __call__(self, site: Site) -> nn.Module:
        width, by = site.channels, site.layout.layers
        layers: list[nn.Module] = [ToMaps(site.layout)]
        if 4 * width <= site.final_channels:
            layers += [*_convolution(by, width, 2 * width, 1), *_convolution(by, 2 * width, width, 1)]
        return nn.Sequential(*layers, *_pooled_linear(by, width, self.outputs))
