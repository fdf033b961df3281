"""Object detectors of torchvision as networks that can be cut: from batched tensors on, anchors and boxes left out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.errors import ConfigError
from localgrad.suspension.untouched import untouched

PROBED_PIXELS = 256


class Detector(nn.Module):
    """The part of a torchvision RetinaNet or FCOS that is trained: backbone, feature pyramid and head.

    ``forward`` takes images (B, 3, H, W), normalised and padded to one size, in training and in eval mode alike.
    It returns what the head answers for the A anchors of all levels, ``cls_logits`` (B, A, classes),
    ``bbox_regression`` (B, A, 4) and, for FCOS, ``bbox_ctrness`` (B, A, 1), with what is needed to read it: ``grids``,
    (h, w) of each level, ``image_size`` (H, W), and ``detector``, the torchvision detector whose losses, anchors and
    post-processing `localgrad.tasks.detection` calls. Parameters and their names are the detector's: train this, and
    the detector is trained.

    Args:
        detector: ``torchvision.models.detection.RetinaNet`` or ``FCOS``, with any backbone.

    Raises:
        ConfigError: another kind of detector.

    Example:
        >>> import torch, localgrad
        >>> model = localgrad.models.retinanet(3, backbone="resnet18").eval()
        >>> model(torch.zeros(1, 3, 64, 64))["grids"]
        [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        from torchvision.models.detection import FCOS, RetinaNet

        if not isinstance(detector, (RetinaNet, FCOS)):
            raise ConfigError(
                f"a {type(detector).__name__} cannot be trained block by block; Detector(...) takes torchvision's "
                "RetinaNet and FCOS, single-stage detectors with one head on all levels of a pyramid"
            )
        self.backbone = detector.backbone
        self.head = DetectionHead(detector)

    @property
    def detector(self) -> Any:
        """The torchvision detector this is a part of."""
        return self.head.detector

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        """See the class."""
        return self.head(self.backbone(inputs), inputs.shape[-2:])

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Pixels between the positions of each level, measured on an empty picture."""
        weight = next(self.backbone.parameters())
        picture = weight.new_zeros(1, 3, PROBED_PIXELS, PROBED_PIXELS)
        with untouched(self.backbone, training=False), torch.no_grad():
            levels = self.backbone(picture)
        return tuple(PROBED_PIXELS // level.shape[-1] for level in levels.values())


class DetectionHead(nn.Module):
    """The head of a torchvision detector, under the same names, and how its answers are to be read; see `Detector`."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        for name, child in detector.head.named_children():  # type: ignore[union-attr]
            self.add_module(name, child)
        self._detector = (detector,)  # a tuple, so that its parameters are registered once

    @property
    def detector(self) -> Any:
        """The torchvision detector this is a part of."""
        return self._detector[0]

    def forward(self, pyramid: Mapping[str, Tensor], image_size: Sequence[int]) -> dict[str, Any]:
        """Levels (B, C, h, w), finest first, and the (H, W) of the images they were computed from."""
        levels = list(pyramid.values())
        grids = [tuple(level.shape[-2:]) for level in levels]
        answers = self.detector.head(levels)
        return {**answers, "grids": grids, "image_size": tuple(image_size), "detector": self.detector}


def retinanet(
    num_classes: int = 80,
    in_channels: int = 3,
    *,
    backbone: str = "resnet50",
    version: int = 1,
    norm: str = "batch",
    width: int = 256,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    **options: Any,
) -> Detector:
    """torchvision's RetinaNet on a feature pyramid of strides 8 to 128.

    Args:
        num_classes: classes; their labels begin at 0.
        in_channels: 3.
        backbone: a torchvision ResNet by name, or ``timm:NAME`` for any model that timm can run with features_only.
        version: 1, or 2 for torchvision's ``retinanet_resnet50_fpn_v2``: GroupNorm in the head, P6 from C5, GIoU loss.
        norm: of a ResNet: ``batch``, or ``group`` with 32 groups, which suits small batches.
        width: channels of the pyramid.
        anchor_sizes: side (pixels) of the smallest anchor of each level; it has others 2 ** (1/3) and 2 ** (2/3) as
            large, each in three shapes.
        options: for ``torchvision.models.detection.RetinaNet``, ``score_thresh`` for instance.

    Raises:
        ConfigError: a setting that does not exist.

    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, arXiv:1708.02002, as torchvision builds it.
    Differs: every layer is trained and BatchNorm not frozen unless asked for; no class stands for the background, since
    the loss needs none (torchvision's weights for COCO have 91 classes, of which 11 never occur).
    """
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.retinanet import RetinaNetHead

    if version not in (1, 2):
        raise ConfigError(f"version={version}; torchvision has RetinaNet in versions 1 and 2")
    if len(anchor_sizes) != 5 or min(anchor_sizes) < 1:
        raise ConfigError(f"anchor_sizes={list(anchor_sizes)}; give one size for each of the 5 levels")
    sizes = tuple(tuple(int(size * 2 ** (k / 3)) for k in range(3)) for size in anchor_sizes)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    pyramid = _pyramid(backbone, in_channels, width, norm, from_c5=version == 2)
    normalised = {"norm_layer": partial(nn.GroupNorm, 32)} if version == 2 else {}
    head = RetinaNetHead(width, anchors.num_anchors_per_location()[0], num_classes, **normalised)
    if version == 2:
        head.regression_head._loss_type = "giou"
    return Detector(RetinaNet(pyramid, num_classes, anchor_generator=anchors, head=head, **options))


def fcos(
    num_classes: int = 80,
    in_channels: int = 3,
    *,
    backbone: str = "resnet50",
    norm: str = "batch",
    width: int = 256,
    **options: Any,
) -> Detector:
    """torchvision's FCOS on a feature pyramid of strides 8 to 128; arguments as for `retinanet`.

    Source: Tian et al., FCOS, arXiv:2006.09214, as torchvision builds it.
    Differs: as `retinanet`.
    """
    from torchvision.models.detection import FCOS

    return Detector(FCOS(_pyramid(backbone, in_channels, width, norm, from_c5=False), num_classes, **options))


def _pyramid(backbone: str, in_channels: int, width: int, norm: str, *, from_c5: bool) -> nn.Module:
    """Maps of strides 8, 16 and 32 and a pyramid over them, with P6 and P7 from P5 or from C5."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    if in_channels != 3:
        raise ConfigError(f"detectors read 3-channel images, the data has {in_channels}")
    if norm not in ("batch", "group"):
        raise ConfigError(f"norm={norm!r}; write batch or group")
    if backbone.startswith("timm:"):
        return _TimmPyramid(backbone.removeprefix("timm:"), width, from_c5)
    body = _resnet(backbone, norm)
    last = body.fc.in_features
    extra = LastLevelP6P7(last if from_c5 else width, width)
    stages = {"layer2": "0", "layer3": "1", "layer4": "2"}
    return BackboneWithFPN(body, stages, [last // 4, last // 2, last], width, extra)


def _resnet(name: str, norm: str) -> Any:
    from torchvision import models

    known = [known for known in models.list_models(module=models) if hasattr(models.resnet, known)]
    if name not in known:
        raise ConfigError(f"backbone={name!r}; write one of {', '.join(known)}, or timm:NAME")
    layer: Callable[..., nn.Module] = partial(nn.GroupNorm, 32) if norm == "group" else nn.BatchNorm2d
    return models.get_model(name, weights=None, norm_layer=layer)


class _TimmPyramid(nn.Module):
    """A model of timm that returns its maps of strides 8, 16 and 32, and a pyramid over them."""

    def __init__(self, name: str, width: int, from_c5: bool) -> None:
        super().__init__()
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

        try:
            import timm

            self.body = timm.create_model(name, features_only=True, pretrained=False)
        except ImportError as error:
            raise ConfigError("backbones from timm need it installed: pip install localgrad[timm]") from error
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ConfigError(f"backbone='timm:{name}' gives no maps: {error}; see timm.list_models()") from error
        infos: Any = self.body.feature_info
        found = [(k, info["num_chs"]) for k, info in enumerate(infos) if info["reduction"] >= 8]
        if [infos[k]["reduction"] for k, _ in found] != [8, 16, 32]:
            raise ConfigError(f"backbone='timm:{name}' has no maps of strides 8, 16 and 32, which a pyramid needs")
        self.indices = [k for k, _ in found]
        widths = [channels for _, channels in found]
        self.fpn = FeaturePyramidNetwork(widths, width, LastLevelP6P7(widths[-1] if from_c5 else width, width))
        self.out_channels = width

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        maps = self.body(inputs)
        return self.fpn(OrderedDict((str(k), maps[index]) for k, index in enumerate(self.indices)))
