"""The convolutional heads of InfoPro, MAN, MAN++ and HPFF."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from localgrad.errors import MethodError
from localgrad.layout import ToMaps
from localgrad.site import Site


@dataclass(frozen=True)
class Conv:
    """``<n>c<m>f``: n 3x3 convolutions with BatchNorm and ReLU, global pooling, m linear layers with ReLU between.

    The first convolution halves the grid and doubles the channels (at most to the model's last width), except in the
    last stage of the model, where both stay.

    Args:
        outputs: width of the last linear layer: classes, or dimensions of an embedding.
        layers: ``"1c2f"`` (InfoPro), ``"2c2f"`` (MAN, MAN++, HPFF), ``"0c1f"`` (global pooling and a linear layer).
        hidden: width of the inner linear layers.

    Source: Wang et al., InfoPro, ICLR 2021, arXiv:2101.10832, released ``auxiliary_nets.py``.
    Differs: widths follow the features instead of a table of 16, 32 and 64 channels; equal for those.
    """

    outputs: int
    layers: str = "1c2f"
    hidden: int = 128

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9]c[1-9]f", self.layers):
            raise MethodError(f"layers={self.layers!r}; write <convolutions>c<linear layers>f, for instance '1c2f'")

    def __call__(self, site: Site) -> nn.Module:
        convolutions, linears, by = int(self.layers[0]), int(self.layers[2]), site.layout.layers
        layers: list[nn.Module] = [ToMaps(site.layout)]
        width = site.channels
        for index in range(convolutions):
            grows = index == 0 and not site.in_last_stage
            wider = max(width, min(2 * width, site.final_channels)) if grows else width
            layers += [
                by.conv(width, wider, 3, stride=2 if grows else 1, padding=1, bias=False),
                by.batch_norm(wider),
                nn.ReLU(inplace=True),
            ]
            width = wider
        layers += [by.adaptive_pool(1), nn.Flatten()]
        for _ in range(linears - 1):
            layers += [nn.Linear(width, self.hidden), nn.ReLU(inplace=True)]
            width = self.hidden
        return nn.Sequential(*layers, nn.Linear(width, self.outputs))
