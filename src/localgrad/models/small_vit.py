"""A vision transformer for very small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallViT(nn.Module):
    """Overlapping patches, ``depth`` pre-norm transformer layers, the mean of all tokens, linear.

    Everything that is trained lies in a layer, the patches or the classifier: there is no class token, and positions
    are fixed sines and cosines of row and column, for images of any size.

    Args:
        num_classes: outputs.
        in_channels: of the images.
        depth: layers.
        width: features of a token, a multiple of 4 and of ``heads``.
        heads: of the attention.
        patch: pixels from one patch to the next. A patch is seen by a convolution with sides of ``2 * patch - 1``.

    Source: Beyer et al., 2022, arXiv:2205.01580 (fixed positions, mean of the tokens).
    Differs: patches overlap, which small images are learned faster with.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, depth: int = 8, width: int = 128, heads: int = 4,
        patch: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, 2 * patch - 1, patch, padding=patch - 1)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W)."""
        x = self.patches(x)
        x = (x + _positions(x)).flatten(2).transpose(1, 2)
        return self.fc(self.norm(self.layers(x).mean(1)))


def _positions(x: Tensor) -> Tensor:
    """Sines and cosines (C, H, W) of row and column, a quarter of the channels each, for features (B, C, H, W)."""
    channels, height, width = x.shape[1:]
    rates = 100.0 ** -torch.linspace(0, 1, channels // 4, device=x.device)
    rows = torch.arange(height, device=x.device)[:, None].expand(height, width)
    columns = torch.arange(width, device=x.device).expand(height, width)
    angles = [rates[:, None, None] * place for place in (rows, columns)]
    return torch.cat([turn(angle) for angle in angles for turn in (torch.sin, torch.cos)]).to(x.dtype)


def vit8(num_classes: int = 10, in_channels: int = 3, depth: int = 8, width: int = 128, patch: int = 4) -> SmallViT:
    """Eight layers of 128 features, 1.6 M parameters: for very small images and quick demonstrations."""
    return SmallViT(num_classes, in_channels, depth, width, patch=patch)
