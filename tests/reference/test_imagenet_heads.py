"""The ImageNet heads of InfoPro, HPFF and MLAAN against their tables, and against the same networks written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.errors import MethodError
from localgrad.heads import imagenet
from localgrad.method import Method, Term
from localgrad.site import Site
from localgrad.spans import Local

TASK = localgrad.tasks.classification(1000, mean=(0.5,) * 3, std=(0.25,) * 3)


class Stage(nn.Module):
    def __init__(self, side: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.side, self.conv = side, nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, size=(self.side, self.side)))


def resnet(sides: tuple[int, ...], widths: tuple[int, ...]) -> nn.Module:
    """Features of the sides and widths that a ResNet has after each stage and once more after the last, for nothing."""
    stages = zip((*sides, sides[-1]), (3, *widths), (*widths, widths[-1]), strict=True)
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1000))
    return nn.Sequential(*(Stage(*stage) for stage in stages), nn.Sequential(*end))


BOTTLENECK = ((56, 28, 14, 7), (256, 512, 1024, 2048))
BASIC = ((56, 28, 14, 7), (64, 128, 256, 512))


def sites(stages: Any = BOTTLENECK, image: int = 224) -> list[Site]:
    """The boundaries behind the first, second and third stage, and inside the last one."""
    found: list[Site] = []

    def note(site: Site) -> nn.Module:
        found.append(site)
        return nn.Linear(1, 1)

    method = Method("note", TASK, (Term(note, TASK.loss),), Local())
    example = torch.randn(2, 3, image, image)
    localgrad.localize(resnet(*stages), method, ("1", "2", "3", "4"), example=example)
    return found


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def convolutions(module: nn.Module) -> list[str]:
    return [
        f"{m.kernel_size[0]} s{m.stride[0]} {m.in_channels}>{m.out_channels}"
        for m in module.modules()
        if isinstance(m, nn.Conv2d)
    ]


def test_classifiers_have_the_published_layers_and_sizes() -> None:
    quarter, eighth, sixteenth, last = (imagenet.Classifier(1000)(site) for site in sites())
    assert convolutions(quarter) == ["1 s1 256>128", "3 s2 128>256", "3 s2 256>512", "1 s1 512>2048"]
    assert convolutions(eighth) == ["1 s1 512>128", "3 s2 128>256", "3 s2 256>512", "1 s1 512>2048"]
    assert convolutions(sixteenth) == ["1 s1 1024>256", "3 s2 256>256", "3 s2 256>512", "1 s1 512>2048"]
    assert (size(eighth), size(sixteenth)) == (4_643_560, 5_135_336)  # 4.64 M and 5.14 M
    for head in (quarter, eighth, sixteenth, last):
        assert [m.in_features for m in head.modules() if isinstance(m, nn.Linear)] == [2048]
        assert all(m.bias is None for m in head.modules() if isinstance(m, nn.Conv2d))


def test_decoders_have_the_published_layers() -> None:
    tail = ["3 s1 32>12", "3 s1 12>3"]
    quarter, eighth, sixteenth, last = (imagenet.Decoder()(site) for site in sites())
    assert convolutions(quarter) == ["1 s1 256>128", "3 s1 128>32", *tail]
    assert convolutions(eighth) == ["1 s1 512>128", "3 s1 128>32", *tail]
    assert convolutions(sixteenth) == ["1 s1 1024>192", "1 s1 192>64", "3 s1 64>32", *tail]
    assert convolutions(last) == ["1 s1 2048>256", "1 s1 256>128", "1 s1 128>64", "3 s1 64>32", *tail]
    grids = {
        name: [m.size[0] for m in head.modules() if hasattr(m, "size")]
        for name, head in zip("qesl", (quarter, eighth, sixteenth, last), strict=True)
    }
    assert grids == {"q": [56, 112, 224], "e": [56, 112, 224], "s": [28, 56, 112, 224], "l": [14, 28, 56, 112, 224]}


def test_pointwise_heads_follow_the_table() -> None:
    first, second, third, last = (imagenet.Pointwise(1000)(site) for site in sites(BASIC))
    assert convolutions(first) == ["1 s1 64>128", "1 s1 128>64"]
    assert convolutions(second) == ["1 s1 128>256", "1 s1 256>128"]
    assert convolutions(third) == convolutions(last) == []
    assert [size(head) for head in (third, last)] == [257_000, 513_000]


def weights(module: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, kind)]


def bn_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """BatchNorm on this batch's statistics, written out, and ReLU."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    y = (x - mean) / torch.sqrt(variance + 1e-5)
    return torch.clamp(y * norm.weight[:, None, None] + norm.bias[:, None, None], min=0)


def up(x: Tensor, side: int) -> Tensor:
    """Bilinear with aligned corners, as two products with matrices of weights."""
    own = x.shape[-1]
    if own == side:
        return x
    at = torch.arange(side, dtype=x.dtype) * (own - 1) / (side - 1)
    low = at.floor().long().clamp(max=own - 2)
    matrix = torch.zeros(side, own, dtype=x.dtype)
    matrix[torch.arange(side), low] = 1 - (at - low)
    matrix[torch.arange(side), low + 1] += at - low
    return matrix @ x @ matrix.T


def classifier_512(x: Tensor, head: nn.Module) -> Tensor:
    (one, two, three, four), norms, (fc,) = (weights(head, k) for k in (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    x = bn_relu(torch.einsum("oi,bihw->bohw", one.weight[:, :, 0, 0], x), norms[0])
    x = bn_relu(F.conv2d(x, two.weight, stride=2, padding=1), norms[1])
    x = bn_relu(F.conv2d(x, three.weight, stride=2, padding=1), norms[2])
    x = bn_relu(torch.einsum("oi,bihw->bohw", four.weight[:, :, 0, 0], x), norms[3])
    return x.mean((2, 3)) @ fc.weight.T + fc.bias


def decoder_1024(x: Tensor, head: nn.Module) -> Tensor:
    convs, norms = (weights(head, k) for k in (nn.Conv2d, nn.BatchNorm2d))
    x = bn_relu(F.conv2d(x, convs[0].weight, convs[0].bias), norms[0])
    x = bn_relu(F.conv2d(up(x, 28), convs[1].weight, convs[1].bias), norms[1])
    for k, side in ((2, 56), (3, 112)):
        x = bn_relu(F.conv2d(up(x, side), convs[k].weight, convs[k].bias, padding=1), norms[k])
    return F.conv2d(up(x, 224), convs[4].weight, convs[4].bias, padding=1)


@pytest.mark.parametrize(
    ("stage", "builder", "reference", "shape"),
    [
        (1, imagenet.Classifier(1000), classifier_512, (2, 1000)),
        (2, imagenet.Decoder(), decoder_1024, (2, 3, 224, 224)),
    ],
)
def test_forward_equals_the_networks_written_out(
    stage: int,
    builder: Callable[[Site], nn.Module],
    reference: Callable[[Tensor, nn.Module], Tensor],
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    site = sites()[stage]
    head = builder(site).double()
    for norm in weights(head, nn.BatchNorm2d):
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias, 0.0, 0.2)
    features = torch.randn(2, *site.features.shape[1:], dtype=torch.float64)
    found = head(features)
    assert found.shape == shape
    torch.testing.assert_close(found, reference(features, head), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("image", [40, 96, 320])
def test_other_image_sizes(image: int) -> None:
    """Sides are rounded up as strided convolutions do, and nothing is ever shrunk to be blown up again."""
    stages = (tuple(-(-image // d) for d in (4, 8, 16, 32)), BOTTLENECK[1])
    for site in sites(stages, image):
        features = torch.randn(2, *site.features.shape[1:])
        assert imagenet.Decoder()(site)(features).shape == (2, 3, image, image)
        half = imagenet.Decoder(scale=0.5)(site)
        assert half(features).shape == (2, 3, round(image / 2), round(image / 2))
        assert imagenet.Classifier(7)(site)(features).shape == (2, 7)
        sides = [m.size[0] for m in imagenet.Decoder()(site).modules() if hasattr(m, "size")]
        assert sides == sorted(sides) and sides[0] >= site.layout.grid[0]


def test_vision_transformers_have_them_too() -> None:
    model = localgrad.models.create("timm:vit_tiny_patch16_224", num_classes=10, image_size=64, depth=2)
    task = localgrad.tasks.classification(10, mean=(0.5,) * 3, std=(0.25,) * 3)
    method = localgrad.methods.infopro(task, head="imagenet", decoder="imagenet")
    network = localgrad.localize(model, method, ("blocks.1",), example=torch.randn(2, 3, 64, 64))
    classifier, decoder = network.auxiliary["0-1"].heads
    features = torch.randn(2, 17, 192)
    assert classifier(features).shape == (2, 10) and decoder(features).shape == (2, 3, 64, 64)


def test_infopro_chooses_between_them() -> None:
    small = localgrad.methods.infopro(TASK)
    large = localgrad.methods.infopro(TASK, head="imagenet", decoder="imagenet")
    assert [type(term.head) for term in small.terms] == [localgrad.heads.Conv, localgrad.heads.Decoder]
    assert [term.head for term in large.terms] == [imagenet.Classifier(1000), imagenet.Decoder()]
    contrast = localgrad.methods.infopro(
        TASK, head=imagenet.Classifier(64), decoder=imagenet.Decoder(0.5), loss="contrast"
    )
    assert [term.head for term in contrast.terms] == [imagenet.Classifier(64), imagenet.Decoder(0.5)]
    with pytest.raises(MethodError, match="unknown decoder"):
        localgrad.methods.infopro(TASK, decoder="coco")
