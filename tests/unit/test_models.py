"""Reference networks and `models.create`."""

from __future__ import annotations

import sys

import pytest
import torch

import localgrad
from localgrad.errors import ConfigError


def test_own_networks_have_the_published_sizes() -> None:
    sizes = {"resnet32": 466_906, "resnet110": 1_730_714}
    for name, size in sizes.items():
        assert sum(p.numel() for p in localgrad.models.create(name).parameters()) == size
    model = localgrad.models.create("resnet8", num_classes=3, in_channels=1)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"depth=33; a CIFAR ResNet has depth 6n \+ 2"):
        localgrad.models.CifarResNet(33)


def test_names_are_listed_with_their_prefix() -> None:
    assert "resnet32" in localgrad.models.available()
    assert "timm:vit_tiny_patch16_224" in localgrad.models.available("timm")
    assert "torchvision:resnet18" in localgrad.models.available("torchvision")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet23", {}, r"unknown model 'resnet23'; did you mean 'resnet32'.*timm:NAME"),
        ("timm:resnet19", {}, r"unknown timm model 'resnet19'; did you mean .*available\('timm'\)"),
        ("timm:zzzz", {}, r"unknown timm model 'zzzz'; it has \d+ others"),
        ("torchvision:resnet19", {}, r"did you mean .*'resnet18'"),
        ("tim:resnet18", {}, r"unknown model library 'tim'; did you mean 'timm'"),
        ("torchvision:resnet18", {"in_channels": 1}, r"^torchvision:resnet18 reads 3-channel images, the data has 1"),
        ("resnet32", {"depth": 3}, r"model 'resnet32' cannot be built with \{'depth': 3\}"),
        ("timm:test_resnet", {"wings": 2}, r"cannot be built with \{'wings': 2\}: .*wings"),
        ("torchvision:resnet18", {"wings": 2}, r"cannot be built with \{'wings': 2\}: .*wings"),
        ("torchvision:vit_b_32", {"image_size": 65}, r"cannot be built"),
    ],
)
def test_refusals(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        localgrad.models.create(name, **options)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_unknown_library() -> None:
    with pytest.raises(ConfigError, match="unknown model library 'torchvison'; did you mean 'torchvision'"):
        localgrad.models.available("torchvison")


def test_timm_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install localgrad\[timm\]"):
        localgrad.models.create("timm:resnet18")


def test_the_image_size_reaches_models_built_for_one_and_no_others() -> None:
    x = torch.randn(1, 3, 32, 32)
    for name in ("timm:vit_tiny_patch16_224", "timm:test_resnet", "torchvision:vit_b_32", "torchvision:resnet18"):
        assert localgrad.models.create(name, num_classes=5, image_size=32).eval()(x).shape == (1, 5)
    assert localgrad.models.create("timm:test_resnet", in_channels=1).eval()(x[:, :1]).shape == (1, 10)
