"""The auxiliary head of object detectors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localgrad.errors import MethodError
from localgrad.layout import ToMaps
from localgrad.models.detection import DetectionHead, Detector
from localgrad.site import Site


@dataclass(frozen=True)
class Detection:
    """A small detector of the model's own kind on the features: a 3x3 convolution, then torchvision's head.

    It answers for the pyramid level whose stride is that of the features, or the first coarser one, to which the
    convolution then strides, and for all coarser levels, which max pooling makes. Anchors, matching, losses and
    post-processing are those of the model's detector, restricted to these levels.

    Args:
        width: channels of the head; None for half of those of the model's pyramid. Rounded up to a multiple of 32, the
            groups of its GroupNorm, and to 64, so that even a single position can be normalised.

    Source: a detection loss on each block is MAN++'s (Su et al., arXiv:2507.16279; released ``retinanet.py``).
    Differs: theirs has one level and the model's width; GroupNorm in the head also where the model's has none, since
    nothing has normalised a pyramid here.
    """

    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise MethodError(f"width={self.width}; a detection head needs at least 1 channel")

    def __call__(self, site: Site) -> nn.Module:
        model = site.partition.model
        if not isinstance(model, Detector):
            raise MethodError(
                f"detection heads follow the detector they help to train, but the model is a {type(model).__name__}; "
                "write localgrad.models.retinanet(...), fcos(...), or Detector(your torchvision RetinaNet or FCOS)"
            )
        if site.layout.kind == "vector" or len(site.layout.grid) != 2:
            raise MethodError(
                f"no detection head for features of shape {tuple(site.features.shape)}: boxes need positions in a "
                "plane, as maps (B, C, H, W) have them; cut elsewhere (cuts=...)"
            )
        known = model.strides
        pixels, positions = site.inputs.shape[-1], site.layout.grid[1]
        finer = [stride for stride in range(1, known[0]) if known[0] % stride == 0]
        stride = min((*finer, *known), key=lambda stride: abs(pixels / stride - positions))
        if abs(pixels / stride - positions) >= 1:  # sides that do not divide are rounded
            raise MethodError(
                f"after block {site.span.stop - 1} features have a stride of {pixels / positions:.1f} pixels, which no "
                f"level of the pyramid ({', '.join(map(str, known))}) is a multiple of; cut elsewhere (cuts=...)"
            )
        first = next(k for k, level in enumerate(known) if level >= stride)
        step = known[first] // stride
        levels = len(known) - first
        if site.patches > 1:  # the grids of patches must make up the grid of the whole
            sides = [-(-side // step) for side in site.layout.grid]
            levels = next(n for n in range(1, levels + 1) if n == levels or any(s % 2**n for s in sides))
        width = max(64, 32 * -(-(self.width or model.detector.backbone.out_channels // 2) // 32))
        adapter = _Levels(site, width, step, levels, known[first])
        return _Local(_restricted(model.detector, adapter, width, first, levels))


class _Levels(nn.Module):
    """Features as levels of a pyramid, finest first; ``stride`` is the finest one's, in pixels of the image."""

    def __init__(self, site: Site, width: int, step: int, levels: int, stride: int) -> None:
        super().__init__()
        self.to_maps = ToMaps(site.layout)
        self.conv = nn.Conv2d(site.channels, width, 3, stride=step, padding=1)
        self.levels = levels
        self.stride = stride

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        maps = [self.conv(self.to_maps(features))]
        while len(maps) < self.levels:
            maps.append(F.max_pool2d(maps[-1], 3, 2, 1))
        return {str(k): level for k, level in enumerate(maps)}


def _restricted(detector: Any, backbone: nn.Module, width: int, first: int, levels: int) -> Any:
    """A detector with all settings of another one, on some of its levels, with a backbone and head of its own."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.fcos import FCOSHead
    from torchvision.models.detection.retinanet import RetinaNetHead

    anchors = detector.anchor_generator
    chosen = slice(first, first + levels)
    per_position = anchors.num_anchors_per_location()[0]
    num_classes = detector.head.classification_head.num_classes
    own = copy.copy(detector)
    own._modules = dict(detector._modules)  # copy.copy shares it
    own.backbone = backbone
    own.anchor_generator = AnchorGenerator(anchors.sizes[chosen], anchors.aspect_ratios[chosen])
    if isinstance(detector.head, FCOSHead):
        own.head = FCOSHead(width, per_position, num_classes)
    else:
        own.head = RetinaNetHead(width, per_position, num_classes, norm_layer=partial(nn.GroupNorm, 32))
        own.head.regression_head._loss_type = detector.head.regression_head._loss_type
    return own


class _Local(nn.Module):
    """Such a detector as a head: reads features instead of images."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = DetectionHead(detector)

    def forward(self, features: Tensor) -> dict[str, Any]:
        levels = self.backbone(features)
        size = [side * self.backbone.stride for side in levels["0"].shape[-2:]]
        return self.head(levels, size)

    def joined(self, answers: dict[str, Any], count: int) -> dict[str, Any]:
        """Answers for ``count x count`` patches of each image, row by row, as those for whole images."""
        grids: Sequence[tuple[int, int]] = answers["grids"]
        tensors = {name: value for name, value in answers.items() if isinstance(value, Tensor)}
        joined = {name: _put_together(value, grids, count) for name, value in tensors.items()}
        height, width = answers["image_size"]
        return {
            **answers,
            **joined,
            "grids": [(h * count, w * count) for h, w in grids],
            "image_size": (height * count, width * count),
        }


def _put_together(values: Tensor, grids: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Values (B * count ** 2, A, C) of patches as (B, count ** 2 * A, C), each level row by row over the image."""
    positions = sum(h * w for h, w in grids)
    anchors, channels = values.shape[1] // positions, values.shape[2]
    levels = []
    for (h, w), level in zip(grids, values.split([h * w * anchors for h, w in grids], 1), strict=True):
        patches = level.reshape(-1, count, count, h, w, anchors, channels)  # B, row, column, h, w
        levels.append(patches.permute(0, 1, 3, 2, 4, 5, 6).reshape(len(patches), -1, channels))
    return torch.cat(levels, 1)
