"""A cut model is the model: outputs, gradients, state and modes, over the families of timm and torchvision."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad import localize, separate_blocks
from localgrad.partition import INPUTS, OUTPUT

TASK = localgrad.tasks.classification(7)
E2E, DGL = localgrad.methods.e2e(TASK), localgrad.methods.dgl(TASK)

# name -> image size (None: the model takes any size, 64 is used)
MODELS: dict[str, int | None] = {
    "timm:resnet10t": None,
    "timm:test_nfnet": None,
    "timm:regnetx_002": None,
    "timm:convnext_atto": None,
    "timm:efficientnet_lite0": None,
    "timm:lcnet_035": None,  # the MobileNet-V3 family
    "timm:ghostnet_050": None,
    "timm:vit_tiny_patch16_224": 64,
    "timm:vit_tiny_patch16_dinov3_qkvb": 64,  # Eva: rotary embeddings computed from buffers alone
    "timm:deit_tiny_patch16_224": 64,
    "timm:gmlp_ti16_224": 64,  # the MLP-Mixer family
    "timm:pit_ti_224": 64,
    "timm:cait_xxs24_224": 64,
    "timm:xcit_nano_12_p16_224": 64,
    "timm:levit_128s": 64,
    "timm:swin_tiny_patch4_window7_224": 64,
    "timm:coat_tiny": 64,  # one module used at several depths
    "timm:mvitv2_tiny": 64,  # blocks return the features and their size
    "torchvision:resnet18": None,
    "torchvision:vgg11_bn": None,
    "torchvision:densenet121": None,
    "torchvision:mobilenet_v3_small": None,
    "torchvision:swin_t": None,
    "torchvision:vit_b_32": 64,
    "torchvision:convnext_tiny": None,
    "torchvision:efficientnet_b0": None,
    "torchvision:regnet_y_400mf": None,
    "torchvision:shufflenet_v2_x0_5": None,
    "torchvision:googlenet": None,
}
DROP = ["timm:vit_tiny_patch16_224", "timm:convnext_atto", "timm:swin_tiny_patch4_window7_224", "torchvision:swin_t"]


def create(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return localgrad.models.create(name, num_classes=7, image_size=MODELS.get(name), **options)


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 64, 64, generator=generator), torch.randint(0, 7, (size,), generator=generator)


def chained(blocks: Sequence[Any], inputs: Any) -> Any:
    values: dict[str, Any] = {INPUTS: inputs}
    for block in blocks:
        values |= zip(block.outputs, block(*[values[name] for name in block.inputs]), strict=True)
    return values[OUTPUT]


@contextmanager
def same_draws_and_state(model: nn.Module) -> Iterator[None]:
    """BatchNorm statistics and the generator as before, afterwards."""
    state = copy.deepcopy(model.state_dict())
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        yield
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_is_the_model(name: str) -> None:
    model = create(name).train()
    example, _ = batch(2)
    before = {key: value.clone() for key, value in model.state_dict(keep_vars=True).items()}
    network = localize(model, E2E, 4, example=example)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert all(module.training for module in model.modules())
    of_blocks = {id(p) for k in range(network.num_blocks) for p in network.parameters_of(k)}
    assert of_blocks <= {id(p) for p in model.parameters()}

    blocks = separate_blocks(network)
    model.eval()  # the model's mode, not the network's, decides
    with torch.no_grad():
        for size in (1, 5):
            inputs, _ = batch(size)
            assert torch.equal(chained(blocks, inputs), model(inputs))

    model.train()
    inputs, targets = batch(5)
    with same_draws_and_state(model):
        output = model(inputs)
        F.cross_entropy(output, targets).backward()
        expected, moved = gradients(model), copy.deepcopy(model.state_dict())
    with same_draws_and_state(model):
        seen = []
        for _, loss in localgrad.local_losses(network, inputs, targets, on_output=lambda *args: seen.append(args[2])):
            loss.backward()
        found = gradients(model)
        assert torch.equal(seen[0], output)
        assert all(torch.equal(value, moved[key]) for key, value in model.state_dict().items())
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []

    network = localize(model, DGL, 4, example=example)
    done: set[int] = set()
    for span, loss in localgrad.local_losses(network, inputs, targets):
        loss.backward()
        done |= {id(p) for p in network.parameters_of(span.start)}
        assert all(p.grad is None for p in model.parameters() if id(p) not in done)
    assert gradients(model).keys() == expected.keys()


@pytest.mark.parametrize("name", DROP)
def test_stochastic_depth_and_dropout_follow_the_mode_of_the_model(name: str) -> None:
    options = {} if name.startswith("torchvision") else {"drop_path_rate": 0.5, "drop_rate": 0.5}
    model = create(name, **options)
    inputs, _ = batch(4)
    blocks = separate_blocks(localize(model.eval(), E2E, 4, example=inputs))
    with torch.no_grad():
        model.train()
        assert not torch.equal(chained(blocks, inputs), chained(blocks, inputs))
        with same_draws_and_state(model):
            expected = model(inputs)
        with same_draws_and_state(model):
            assert torch.equal(chained(blocks, inputs), expected)
        model.eval()
        assert torch.equal(chained(blocks, inputs), chained(blocks, inputs))
        assert torch.equal(chained(blocks, inputs), model(inputs))
