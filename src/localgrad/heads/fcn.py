"""The auxiliary head of segmentation networks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from localgrad.errors import MethodError
from localgrad.layout import ToMaps
from localgrad.site import Site


@dataclass(frozen=True)
class FCN:
    """A 3x3 convolution with BatchNorm and ReLU, dropout, a 1x1 convolution: class logits at the features' own grid.

    Prefix tokens are left out; vectors become a grid of one position.

    Args:
        outputs: classes.
        width: channels between the convolutions; None for a quarter of the features', at least 64.
        dropout: share of the inner values that are zeroed.

    Source: Long et al., FCN, CVPR 2015, arXiv:1411.4038, in the form of torchvision's ``FCNHead``, the auxiliary
    classifier of its segmentation models.
    Differs: at least 64 channels, because early features have few.
    """

    outputs: int
    width: int | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if (self.width is not None and self.width < 1) or not 0.0 <= self.dropout < 1.0:
            raise MethodError(
                f"width={self.width}, dropout={self.dropout}; the head needs at least 1 channel and a dropout of at "
                "least 0 and below 1"
            )

    def __call__(self, site: Site) -> nn.Module:
        width = self.width or max(64, site.channels // 4)
        by = site.layout.layers
        return nn.Sequential(
            ToMaps(site.layout),
            by.conv(site.channels, width, 3, padding=1, bias=False),
            by.batch_norm(width),
            nn.ReLU(inplace=True),
            nn.Dropout(self.dropout),
            by.conv(width, self.outputs, 1),
        )
