"""Models of the transformers library: cut by themselves, or given as a list of modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import localgrad
from localgrad import localize, methods
from localgrad.network import LocalNetwork
from localgrad.testing import assert_isolated, assert_transparent

TASK = localgrad.tasks.classification(10)
X, Y = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(4)
WIDTHS, DEPTHS = [8, 16, 32, 64], [1, 1, 2, 1]


class Logits(nn.Module):
    """A classifier of the library as a function of the images alone."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(pixel_values=images).logits
        return logits


class ClassToken(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def swin() -> Any:
    return SwinForImageClassification(
        SwinConfig(  # type: ignore[call-arg]
            image_size=64,
            patch_size=4,
            embed_dim=16,
            depths=DEPTHS,
            num_heads=[1, 2, 4, 8],
            window_size=2,
            num_labels=10,
        )
    )


def convnext() -> Any:
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=WIDTHS, depths=DEPTHS, num_labels=10))  # type: ignore[call-arg]


def segformer() -> Any:
    return SegformerForImageClassification(
        SegformerConfig(hidden_sizes=WIDTHS, depths=DEPTHS, num_labels=10, num_attention_heads=[1, 1, 2, 4])  # type: ignore[call-arg]
    )


def vit() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=64, patch_size=16, num_labels=10))  # type: ignore[call-arg]


def check(model: nn.Module, network: LocalNetwork) -> None:
    assert network.num_blocks == 4
    assert_transparent(model, network, X)
    assert_isolated(network, X, Y)


@pytest.mark.parametrize("build", [swin, convnext, segformer, vit])
def test_models_are_cut_by_themselves(build: Any) -> None:
    torch.manual_seed(0)
    model = Logits(build()).train()
    check(model, localize(model, methods.dgl(TASK), 4, example=X[:2]))


def test_vit_is_given_as_a_list_of_modules() -> None:
    torch.manual_seed(0)
    model = Logits(vit()).train()
    base, layers = model.classifier.vit, model.classifier.vit.layers
    modules = [
        nn.Sequential(base.embeddings, *layers[:2]),
        layers[2],
        nn.Sequential(*layers[3:5]),
        nn.Sequential(*layers[5:], base.layernorm, ClassToken(), model.classifier.classifier),
    ]
    check(model, localize(model, methods.dgl(TASK), modules, example=X[:2]))
