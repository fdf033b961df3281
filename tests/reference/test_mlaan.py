"""MLAAN again, literally: windows run again from detached features, leaps unit by unit, the published leap tables."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from test_man import agree, buffers_kept, follow, train_both
from test_papers import CLASSES, TASK, copied, data
from test_pgl import trained
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad import cuts
from localgrad.bridges.momentum import MomentumBridge
from localgrad.methods import dgl, mlaan, windows
from localgrad.models import CifarResNet

DECAY = 0.9
CUTS = ("layer1.2", "layer2.1", "layer3.1")
WIDTHS = {1: 16, 2: 32, 3: 64}  # channels at each boundary
# The first unit of every later stage, then of what is left the middle unit and the last one.
CHAINS = {
    1: ("layer2.0", "layer3.0", "layer3.1", "layer3.2"),
    2: ("layer3.0", "layer3.1", "layer3.2"),
    3: ("layer3.1", "layer3.2"),
}
LINEAR = localgrad.heads.Linear(CLASSES)


def blocks_of(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """Four blocks of a ResNet-20."""
    one, two, three = model.layer1, model.layer2, model.layer3
    return [
        lambda x: one[1](one[0](torch.relu(model.bn1(model.conv1(x))))),
        lambda x: two[0](one[2](x)),
        lambda x: three[0](two[2](two[1](x))),
        lambda x: model.fc(three[2](three[1](x)).mean((2, 3))),
    ]


class Leaping(nn.Module):
    """Learnable copies of later units in a row, the first ones with a frozen copy beside them, then a read-out."""

    def __init__(self, sources: list[nn.Module], twins: int, width: int) -> None:
        super().__init__()
        self.twins = nn.ModuleList(copy.deepcopy(source).requires_grad_(False) for source in sources[:twins])
        self.layers = nn.ModuleList(copy.deepcopy(source) for source in sources)
        self.read = nn.Linear(64 if sources else width, CLASSES)

    def forward(self, z: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            z = layer(z) + self.twins[k](z) if k < len(self.twins) else layer(z)
        return self.read(z.mean((2, 3)))


def in_our_order(auxiliary: nn.Module) -> nn.Module:
    """The library's auxiliary network in the order of `Leaping`."""
    bridges = [module for module in auxiliary.modules() if isinstance(module, MomentumBridge)]
    twins = [bridge.twin for bridge in bridges]
    layers = [layer for bridge in bridges for layer in (bridge.companion, *bridge.later)]
    return nn.ModuleList([nn.ModuleList(twins), nn.ModuleList(layers), auxiliary.heads[0]])


@pytest.mark.parametrize(
    "width, leap, twins",
    [(2, "cascade", "first"), (2, "both", "all"), (3, "cascade", "all"), (3, "independent", "first")],
)
def test_three_steps(width: int, leap: str, twins: str) -> None:
    method = mlaan(
        windows(dgl(TASK, head=LINEAR), width=width, local=0.25, cascade=0.75), leap=leap, twins=twins, decay=DECAY
    )
    torch.manual_seed(0)
    model = localgrad.models.resnet20(CLASSES).double()
    _, images, targets = data()
    network = localgrad.localize(model, method, CUTS, example=images)
    bare = copy.deepcopy(model)

    spans = [(k, k + 1) for k in range(3)] + [(k, k + width) for k in range(4 - width)]
    own: dict[tuple[int, int], Leaping] = {}
    for start, stop in spans:
        leaps = leap == "both" or leap == ("cascade" if stop - start > 1 else "independent")
        names = CHAINS[stop] if leaps else ()
        sources = [bare.get_submodule(name) for name in names]
        own[start, stop] = Leaping(sources, 1 if twins == "first" else len(sources), WIDTHS[stop]).double()
    library = [in_our_order(network.auxiliary[f"{start}-{stop}"]) for start, stop in spans]
    assert len(library) == len(network.auxiliary)
    for mine, other in zip(own.values(), library, strict=True):
        copied(mine.read, other[2])
    agree(nn.ModuleList(own.values()).parameters(), nn.ModuleList(library).parameters())  # copies start at the source
    start_of_twins = [p.clone() for one in own.values() for p in one.twins.parameters()]
    assert start_of_twins

    def objective(start: int, stop: int, h: Tensor) -> Tensor:
        return F.cross_entropy(h if stop == 4 else own[start, stop](h), targets)

    def step(_: int) -> None:
        blocks = blocks_of(bare)
        features = [images]
        for k, block in enumerate(blocks):
            h = block(features[k])
            (0.25 * objective(k, k + 1, h)).backward()
            features.append(h.detach())
        for start in range(4 - width + 1):
            with buffers_kept(bare):
                h = features[start]
                for block in blocks[start : start + width]:
                    h = block(h)
                (0.75 * objective(start, start + width, h)).backward()

    def after() -> None:
        for (_, stop), one in own.items():
            for twin, name in zip(one.twins, CHAINS[stop], strict=False):
                follow(twin, bare.get_submodule(name), DECAY)

    train_both(network, bare, list(own.values()), library, step, after)
    end_of_twins = [p for one in own.values() for p in one.twins.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(start_of_twins, end_of_twins, strict=True))


def test_every_twin_follows_its_own_unit_by_the_closed_form() -> None:
    """``decay**n * first + (1 - decay) * sum_i decay**(n - 1 - i) * source after step i``, for each twin of a chain."""
    torch.manual_seed(0)
    model = localgrad.models.resnet20(CLASSES).double()
    _, images, targets = data()
    method = mlaan(dgl(TASK, head=LINEAR), leap="both", twins="all", decay=DECAY)
    network = localgrad.localize(model, method, CUTS, example=images)
    units = {name: module for name, module in model.named_modules() if name in CHAINS[1]}
    start = {name: [p.detach().clone() for p in unit.parameters()] for name, unit in units.items()}
    seen: dict[str, list[list[Tensor]]] = {name: [] for name in units}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.05, momentum=0.9)
    for step in range(4):
        localgrad.backward(network, images, targets, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        localgrad.exchange(network)
        for name, unit in units.items():
            seen[name].append([p.detach().clone() for p in unit.parameters()])
    counted = 0
    for key, auxiliary in network.auxiliary.items():
        bridges = [module for module in auxiliary.modules() if isinstance(module, MomentumBridge)]
        for name, bridge in zip(CHAINS[int(key[-1])], bridges, strict=True):
            for k, p in enumerate(bridge.twin.parameters()):
                expected = DECAY**4 * start[name][k]
                for i in range(4):
                    expected = expected + (1 - DECAY) * DECAY ** (3 - i) * seen[name][i][k]
                assert not torch.equal(p, start[name][k])
                agree([expected], [p])
            counted += 1
    assert counted == 4 + 3 + 2 + 3 + 2  # single blocks end at 1, 2, 3, inner windows at 2, 3


# --- leap tables (core.md 3.2): last module of a row -> its chain, stage.index, stages from 1 ----------------------

R32_8 = {1: "2.0 3.0 3.2 3.4", 2: "2.0 3.0 3.3 3.4", 4: "3.0 3.2 3.3 3.4", 5: "3.2 3.3 3.4", 6: "3.3 3.4"}
R32_15 = dict.fromkeys((0, 1, 3), "2.0 3.0 3.2 3.4") | dict.fromkeys((2, 4), "2.0 3.0 3.3 3.4")
R32_15 |= {9: "3.0 3.2 3.3 3.4", 10: "3.1 3.2 3.4", 11: "3.2 3.3 3.4", 12: "3.3 3.4", 13: "3.4"}
R110_32 = {10: "2.0 3.0 3.2 3.17", 20: "3.0 3.2 3.3 3.17", 21: "3.0 3.3 3.4 3.17", 25: "3.8 3.17", 27: "3.14 3.17"}
R110_32 |= {28: "3.15 3.17", 29: "3.16 3.17", 30: "3.17"}
R110_54 = {17: "2.0 3.0 3.2 3.17", 34: "3.0 3.2 3.3 3.17", 35: "3.0 3.3 3.4 3.17", 42: "3.8 3.17", 46: "3.14 3.17"}
R110_54 |= {48: "3.15 3.17", 51: "3.16 3.17", 52: "3.17"}
R34_16 = {2: "2.0 2.1 3.0 4.0 4.2", 6: "2.1 3.0 4.0 4.2", 12: "3.1 4.0 4.1", 13: "4.1 4.1 4.2", 14: "4.1 4.2"}
R101_33 = {2: "2.0 3.0 4.0 4.2", 6: "3.0 4.0 4.1", 29: "4.0 4.1", 31: "4.1 4.2"}
# Segment ends of core.md 1.4, without the network's own.
ENDS_R32_8 = "1.0 1.2 1.4 2.1 2.3 3.0 3.2"
ENDS_R110_32 = " ".join(
    [f"{stage}.{i}" for stage in (1, 2) for i in (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)]
    + [f"3.{i}" for i in (1, 3, 4, 6, 7, 9, 11, 13, 15)]
)


def names_of(chain: str) -> list[str]:
    return [f"layer{name}" for name in chain.split()]


def cuts_after(ends: str, length: int) -> tuple[str, ...]:
    """The units right after the ends of segments."""
    found = []
    for end in ends.split():
        stage, index = map(int, end.split("."))
        found.append(f"layer{stage}.{index + 1}" if index + 1 < length else f"layer{stage + 1}.0")
    return tuple(found)


def leaps_of(model: nn.Module, images: Tensor, cutting: Any) -> list[list[str]]:
    """At each boundary the units whose copies form the chain, by name."""
    head = localgrad.heads.Linear(CLASSES)
    method = mlaan(dgl(TASK, head=head), leap="independent", twins="all")
    network = localgrad.localize(model, method, cutting, example=images)
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for k in range(network.num_blocks - 1):
        auxiliary = network.auxiliary[f"{k}-{k + 1}"]
        bridges = [module for module in auxiliary.modules() if isinstance(module, MomentumBridge)]
        found.append([names[id(twin.source)] for bridge in bridges for twin in bridge.twins])
    return found


def rows(table: dict[int, str], modules: int) -> list[list[str]]:
    return [names_of(table[min(last for last in table if last >= module)]) for module in range(modules - 1)]


def thin(depth: int) -> CifarResNet:
    """A CIFAR ResNet of two channels: the tables speak of units only."""
    return CifarResNet(depth, CLASSES, width=2)


def test_published_leaps() -> None:
    images = torch.randn(2, 3, 16, 16)
    assert leaps_of(thin(32), images, cuts_after(ENDS_R32_8, 5)) == rows(R32_8, 8)
    assert leaps_of(thin(32), images, cuts.by_count(15, stem="merged")) == rows(R32_15, 15)
    assert leaps_of(thin(110), images, cuts_after(ENDS_R110_32, 18)) == rows(R110_32, 32)
    assert leaps_of(thin(110), images, cuts.by_count(54, stem="merged")) == rows(R110_54, 54)


def test_published_leaps_with_a_block_for_the_stem() -> None:
    """K = 16 and 9 where the stem trains alone: it leaps as the first module does, the others as before."""
    images = torch.randn(2, 3, 16, 16)
    found = leaps_of(thin(32), images, cuts.by_count(16, stem="own"))
    assert found == [names_of(R32_15[0]), *rows(R32_15, 15)]
    found = leaps_of(thin(32), images, ("layer1.0", *cuts_after(ENDS_R32_8, 5)))
    assert found == [names_of(R32_8[1]), *rows(R32_8, 8)]


@pytest.mark.parametrize(
    "block, layers, table", [("BasicBlock", (3, 4, 6, 3), R34_16), ("Bottleneck", (3, 4, 23, 3), R101_33)]
)
def test_published_leaps_of_imagenet_resnets(block: str, layers: tuple[int, ...], table: dict[int, str]) -> None:
    """A module per unit, in networks of a few channels."""
    made = getattr(timm.models.resnet, block)
    model = timm.models.resnet.ResNet(made, layers, channels=(2, 4, 8, 16), stem_width=2, num_classes=CLASSES)
    found = leaps_of(model, torch.randn(2, 3, 64, 64), cuts.by_count(sum(layers), stem="merged"))
    assert found == rows(table, sum(layers))


def test_the_rule_on_other_networks() -> None:
    """First units of later stages, then the middle one and the last one of the rest; no table knows these networks."""
    images = torch.randn(2, 3, 16, 16)
    found = leaps_of(thin(20), images, ("layer1.2", "layer2.0", "layer3.0", "layer3.2"))
    early = names_of("2.0 3.0 3.1 3.2")
    assert found == [early, early, names_of("3.0 3.1 3.2"), names_of("3.2")]

    resnet18 = torchvision.models.resnet18(num_classes=CLASSES)
    found = leaps_of(resnet18, torch.randn(2, 3, 64, 64), ("layer2", "layer3", "layer4", "layer4.1"))
    assert found == [names_of(c) for c in ("2.0 3.0 4.0 4.1", "3.0 4.0 4.1", "4.0 4.1", "4.1")]

    vit = timm.models.VisionTransformer(16, 4, num_classes=CLASSES, embed_dim=8, depth=7, num_heads=2)
    found = leaps_of(vit, images, ("blocks.2", "blocks.4", "blocks.6"))
    assert found == [["blocks.4", "blocks.6"], ["blocks.5", "blocks.6"], ["blocks.6"]]


def test_without_cascades_it_is_its_base_bit_for_bit() -> None:
    pairs = zip(trained(mlaan(windows(dgl(TASK), cascade=0.0))), trained(dgl(TASK)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for other in (mlaan(dgl(TASK)), mlaan(windows(dgl(TASK), cascade=0.0), leap="independent")):
        assert not all(torch.equal(a, b) for a, b in zip(trained(other), trained(dgl(TASK)), strict=True))
