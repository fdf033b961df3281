"""The residual networks for 32-pixel images that the papers train."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution with BatchNorm where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class CifarResNet(nn.Module):
    """ResNet of depth ``6n + 2``: a 3x3 stem, three stages of n units with 16, 32 and 64 channels, pooling, linear.

    Args:
        depth: 20, 32, 56, 110, or another ``6n + 2``.
        num_classes: outputs.
        in_channels: of the images, 3 or 1.
        width: channels of the first stage.

    Source: He et al., 2016, arXiv:1512.03385, section 4.2, with the 1x1 shortcuts and the initialisation (normal with
    deviation ``sqrt(2 / (k * k * C_out))``) of the InfoPro family.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        units = (depth - 2) // 6
        if depth != 6 * units + 2 or units < 1:
            raise ValueError(f"depth={depth}; a CIFAR ResNet has depth 6n + 2, for instance 20, 32, 56 or 110")
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, units, 1)
        self.layer2 = self._stage(width, 2 * width, units, 2)
        self.layer3 = self._stage(2 * width, 4 * width, units, 2)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    @staticmethod
    def _stage(inputs: int, outputs: int, units: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(inputs, outputs, stride), *(BasicBlock(outputs, outputs, 1) for _ in range(units - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet8(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Depth 8: three units, for very small images and quick demonstrations."""
    return CifarResNet(8, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Depth 20, 0.27 M parameters."""
    return CifarResNet(20, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Depth 32, 466,906 parameters."""
    return CifarResNet(32, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Depth 56, 0.86 M parameters."""
    return CifarResNet(56, num_classes, in_channels)


def resnet110(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Depth 110, 1,730,714 parameters."""
    return CifarResNet(110, num_classes, in_channels)
