"""TRGL again, literally: the energy of every residual branch, measured by walking through the units by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from test_man import agree, train_both
from test_papers import CLASSES, TASK, copied, data
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.methods import dgl, e2e, trgl
from localgrad.partition import Partition
from localgrad.partition.residual import residual_branches

TAU = 3.0
BASE = dgl(TASK, head=localgrad.heads.Linear(CLASSES))
Walked = tuple[Tensor, list[Tensor]]  # features, and the branches on the way


def through(units: list[nn.Module], x: Tensor) -> Walked:
    """Residual units one by one; the branch is what bn2 returns."""
    branches = []
    for unit in units:
        branch = unit.bn2(unit.conv2(torch.relu(unit.bn1(unit.conv1(x)))))
        if hasattr(unit, "shortcut"):
            around = unit.shortcut(x)
        else:  # torchvision's
            around = x if unit.downsample is None else unit.downsample(x)
        branches.append(branch)
        x = torch.relu(around + branch)
    return x, branches


def energy(branches: list[Tensor], tau: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for branch in branches:
        total = total + (branch * branch).sum() / branch.numel()
    return total / (2 * tau)


def test_energies_are_those_of_a_loop() -> None:
    ones = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    assert energy([2 * ones, ones], 5.0).item() == pytest.approx(0.1 * 5.0)


def cifar_blocks(model: nn.Module, stem_alone: bool) -> list[Callable[[Tensor], Walked]]:
    def stem(x: Tensor) -> Walked:
        return torch.relu(model.bn1(model.conv1(x))), []

    def last(x: Tensor) -> Walked:
        h, branches = through(list(model.layer3), x)
        return model.fc(h.mean((2, 3))), branches

    stages: list[Callable[[Tensor], Walked]] = [lambda x: through(list(model.layer2), x), last]
    if stem_alone:
        return [stem, lambda x: through(list(model.layer1), x), *stages]
    return [lambda x: through(list(model.layer1), stem(x)[0]), *stages]


@pytest.mark.parametrize("stem_alone", [False, True])
def test_three_steps(stem_alone: bool) -> None:
    """Two units in each stage; a stem without branches adds nothing; tau is twice as large in the second half."""
    torch.manual_seed(0)
    model = localgrad.models.CifarResNet(14, CLASSES).double()
    cuts = ("layer1",) * stem_alone + ("layer2", "layer3")
    _, images, targets = data()
    network = localgrad.localize(model, trgl(BASE, tau=TAU), cuts, example=images)
    bare = copy.deepcopy(model)
    library = list(network.auxiliary.values())
    widths = (16, 16, 32) if stem_alone else (16, 32)
    own = [copied(nn.Linear(width, CLASSES), aux) for width, aux in zip(widths, library, strict=True)]
    # K = 4: blocks 2 and 3 are the second half. K = 3: the middle block begins before half of the blocks are done.
    taus = [TAU, TAU, 2 * TAU, 2 * TAU] if stem_alone else [TAU, TAU, 2 * TAU]

    def step(_: int) -> None:
        x = images
        for k, block in enumerate(cifar_blocks(bare, stem_alone)):
            x, branches = block(x)
            logits = x if k == len(own) else own[k](x.mean((2, 3)))
            (F.cross_entropy(logits, targets) + energy(branches, taus[k])).backward()
            x = x.detach()

    train_both(network, bare, own, library, step)


def test_torchvision_adds_in_place() -> None:
    """``out += identity`` overwrites the branch; its energy is that of the branch all the same."""
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES).double()
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(4, 3, 40, 40, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    network = localgrad.localize(model, trgl(BASE, tau=TAU), ("layer2", "layer4"), example=images)
    bare = copy.deepcopy(model)
    library = list(network.auxiliary.values())
    own = [copied(nn.Linear(width, CLASSES), aux) for width, aux in zip((64, 256), library, strict=True)]
    x = F.max_pool2d(torch.relu(bare.bn1(bare.conv1(images))), 3, 2, 1)
    for k, stages in enumerate(([bare.layer1], [bare.layer2, bare.layer3], [bare.layer4])):
        x, branches = through([unit for stage in stages for unit in stage], x)
        logits = (bare.fc if k == 2 else own[k])(x.mean((2, 3)))
        (F.cross_entropy(logits, targets) + energy(branches, TAU if k < 2 else 2 * TAU)).backward()
        x = x.detach()
    localgrad.backward(network, images, targets)
    for ours, theirs in ((bare, model), *zip(own, library, strict=True)):
        agree([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_branches_of_a_vision_transformer() -> None:
    """Attention and MLP of each block; the position embedding, which is added too, is none."""
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(16, 4, num_classes=CLASSES, embed_dim=8, depth=4, num_heads=2).double()
    _, images, targets = data()
    found = [path for _, path in residual_branches(Partition(vit, images))]
    assert len(found) == 8
    assert [path.split(".")[1] for path in found] == [str(k) for k in range(4) for _ in range(2)]

    network = localgrad.localize(vit, trgl(BASE, tau=TAU), ("blocks.2",), example=images)
    bare = copy.deepcopy(vit)
    own = nn.ModuleList([nn.LayerNorm(8, 1e-6), nn.Linear(8, CLASSES)])
    copied(own, network.auxiliary["0-1"])
    x = bare._pos_embed(bare.patch_embed(images))
    for half in range(2):
        branches = []
        for block in bare.blocks[2 * half : 2 * half + 2]:
            branches.append(block.attn(block.norm1(x)))
            x = x + branches[-1]
            branches.append(block.mlp(block.norm2(x)))
            x = x + branches[-1]
        logits = bare.head(bare.norm(x)[:, 0]) if half else own[1](own[0](x[:, 0]))
        (F.cross_entropy(logits, targets) + energy(branches, TAU * (1 + half))).backward()
        x = x.detach()
    localgrad.backward(network, images, targets)
    agree([p.grad for p in bare.parameters()], [p.grad for p in vit.parameters()])
    agree([p.grad for p in own.parameters()], [p.grad for p in network.auxiliary.parameters()])


def test_refusals() -> None:
    layers = torchvision.models.vgg.make_layers([8, "M", 8, "M", 8])
    vgg = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    images = torch.randn(2, 3, 16, 16)
    localgrad.localize(vgg, BASE, 2, example=images)
    with pytest.raises(localgrad.MethodError, match="no residual branches"):
        localgrad.localize(vgg, trgl(BASE), 2, example=images)
    for tau in (0.0, -1.0, float("nan")):
        with pytest.raises(localgrad.MethodError, match="tau"):
            trgl(BASE, tau=tau)
    with pytest.raises(localgrad.MethodError, match="no auxiliary heads"):
        trgl(e2e(TASK))
