"""The structure and the published sizes of the papers' auxiliary networks, on the CIFAR ResNet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import localgrad
from localgrad import heads

TASK = localgrad.tasks.classification(10, mean=(0.5,) * 3, std=(0.25,) * 3)


def on_resnet32(method: localgrad.Method) -> list[nn.Module]:
    """Its auxiliary networks at 16, 32 and 64 channels."""
    network = localgrad.localize(
        localgrad.models.resnet32(), method, ("layer2", "layer3", "layer3.2"), example=torch.randn(2, 3, 32, 32)
    )
    return [network.auxiliary[key] for key in ("0-1", "1-2", "2-3")]


def layers(module: nn.Module) -> list[str]:
    """Convolutions, norms, activations and linear layers in order, with their widths."""
    found = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            bias = "" if layer.bias is None else " bias"
            found.append(
                f"conv{layer.kernel_size[0]} s{layer.stride[0]} {layer.in_channels}>{layer.out_channels}{bias}"
            )
        elif isinstance(layer, nn.Linear):
            found.append(
                f"fc {layer.in_features}>{layer.out_features}" + ("" if layer.bias is not None else " no bias")
            )
        elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            found.append(f"bn {layer.num_features}")
        elif isinstance(layer, nn.ReLU):
            found.append("relu")
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            found.append(f"pool {layer.output_size}")
    return found


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_2c2f_has_the_published_sizes() -> None:
    found = on_resnet32(localgrad.methods.dgl(TASK, head=heads.Conv(10, "2c2f")))
    assert [size(auxiliary) for auxiliary in found] == [19_466, 65_162, 83_594]


def test_decoder_has_the_published_sizes() -> None:
    found = on_resnet32(localgrad.methods.infopro(TASK))
    assert [size(auxiliary.heads[1]) for auxiliary in found] == [2_091, 3_819, 7_275]
    assert layers(found[0].heads[1]) == ["conv3 s1 16>12 bias", "bn 12", "relu", "conv3 s1 12>3 bias"]


END = ["fc 64>128", "relu", "fc 128>10"]
STRUCTURES = {
    "0c1f": [["pool 1", f"fc {c}>10"] for c in (16, 32, 64)],
    "0c2f": [["pool 1", f"fc {c}>128", "relu", "fc 128>10"] for c in (16, 32, 64)],
    "1c1f": [
        ["conv3 s2 16>32", "bn 32", "relu", "pool 1", "fc 32>10"],
        ["conv3 s2 32>64", "bn 64", "relu", "pool 1", "fc 64>10"],
        ["conv3 s1 64>64", "bn 64", "relu", "pool 1", "fc 64>10"],
    ],
    "1c2f": [
        ["conv3 s2 16>32", "bn 32", "relu", "pool 1", "fc 32>128", "relu", "fc 128>10"],
        ["conv3 s2 32>64", "bn 64", "relu", "pool 1", *END],
        ["conv3 s1 64>64", "bn 64", "relu", "pool 1", *END],
    ],
    "1c3f": [
        ["conv3 s2 16>32", "bn 32", "relu", "pool 1", "fc 32>128", "relu", "fc 128>128", "relu", "fc 128>10"],
        ["conv3 s2 32>64", "bn 64", "relu", "pool 1", "fc 64>128", "relu", "fc 128>128", "relu", "fc 128>10"],
        ["conv3 s1 64>64", "bn 64", "relu", "pool 1", "fc 64>128", "relu", "fc 128>128", "relu", "fc 128>10"],
    ],
    "2c2f": [
        [
            "conv3 s2 16>32",
            "bn 32",
            "relu",
            "conv3 s1 32>32",
            "bn 32",
            "relu",
            "pool 1",
            "fc 32>128",
            "relu",
            "fc 128>10",
        ],
        ["conv3 s2 32>64", "bn 64", "relu", "conv3 s1 64>64", "bn 64", "relu", "pool 1", *END],
        ["conv3 s1 64>64", "bn 64", "relu", "conv3 s1 64>64", "bn 64", "relu", "pool 1", *END],
    ],
}


@pytest.mark.parametrize("config", STRUCTURES)
def test_conv_heads_follow_the_table(config: str) -> None:
    found = on_resnet32(localgrad.methods.dgl(TASK, head=heads.Conv(10, config)))
    assert [layers(auxiliary) for auxiliary in found] == STRUCTURES[config]


def test_contrastive_infopro_ends_in_an_embedding() -> None:
    found = on_resnet32(localgrad.methods.infopro(TASK, loss="contrast"))
    assert layers(found[0].heads[0])[-3:] == ["fc 32>128", "relu", "fc 128>128"]
    assert not any(term.scored for term, _ in found[0].terms)


def test_dgl_head_is_mlp_sr() -> None:
    for auxiliary, channels, pooled in zip(
        on_resnet32(localgrad.methods.dgl(TASK)), (16, 32, 64), (8, 4, 2), strict=True
    ):
        wide = 4 * channels
        assert layers(auxiliary) == [
            f"pool ({pooled}, {pooled})",
            *[f"conv1 s1 {channels}>{channels}", f"bn {channels}", "relu"] * 3,
            "pool (2, 2)",
            *[f"fc {wide}>{wide}", f"bn {wide}", "relu"] * 3,
            f"fc {wide}>10",
        ]


def test_mlaan_heads_over_dgl() -> None:
    """MAN++'s head without pooling before its convolutions: a grid of 96 leaves features of CIFAR as they are."""
    head = {"mlp": {"grid": 96, "width": 128, "pooled": 1, "hidden": 512}}
    first, _, third = on_resnet32(localgrad.methods.dgl(TASK, head=head))
    assert layers(first)[:2] == ["pool (32, 32)", "conv1 s1 16>128"]
    assert layers(third)[:2] == ["pool (8, 8)", "conv1 s1 64>128"]


def test_predsim_heads() -> None:
    first, second, third = on_resnet32(localgrad.methods.predsim(TASK))
    assert layers(first) == ["pool (8, 8)", "fc 1024>10", "conv3 s1 16>16"]
    assert layers(second) == ["pool (4, 8)", "fc 1024>10", "conv3 s1 32>32"]
    assert layers(third) == ["pool (4, 4)", "fc 1024>10", "conv3 s1 64>64"]
    assert not first.heads[0][-1].weight.any()
    assert [weight for _, weight in first.terms] == pytest.approx([0.01, 0.99])
