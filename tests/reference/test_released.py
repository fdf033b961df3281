"""Released training steps again, literally: networks walked as the authors' code walks them, from its facts alone.

``released=True`` against these loops: gradients and losses at each of three steps, weights after them, to 1e-12.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from test_man import LastStageHead, agree, buffers_kept, follow, train_both
from test_papers import (
    CLASSES,
    TASK,
    ImageDecoder,
    OneConvTwoLinear,
    binary_cross_entropy,
    copied,
    data,
    supervised_contrastive,
)
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.bridges.momentum import MomentumBridge
from localgrad.method import Method
from localgrad.methods import auglocal, dgl, hpff, infopro, kaiming, man, man_pp, mlaan, predsim, windows
from localgrad.models import CifarResNet

DECAY = 0.9
IMAGE, LABEL = (5.0, 4.0, 3.0, 2.0), (0.5, 0.4, 0.3, 0.2)  # for the stem and three stages


def label_head(width: int, outputs: int = CLASSES) -> nn.Module:
    """``1c2f``."""
    head: nn.Module = OneConvTwoLinear(width, outputs) if width < 64 else LastStageHead()
    if width == 64 and outputs != CLASSES:
        head.fc2 = nn.Linear(128, outputs)
    return head


def network_of(method: Method, stage: int, stem: bool) -> tuple[localgrad.LocalNetwork, nn.Module, list[nn.Module]]:
    """A network with a block for every residual unit, the stem with the first one or a block of its own."""
    torch.manual_seed(0)
    model = CifarResNet(6 * stage + 2, CLASSES).double()
    names = [f"layer{s}.{i}" for s in (1, 2, 3) for i in range(stage)]
    network = localgrad.localize(model, method, tuple(names[not stem :]), example=data(2)[1])
    bare = copy.deepcopy(model)
    return network, bare, [bare.get_submodule(name) for name in names]


def stem_of(bare: nn.Module, images: Tensor) -> Tensor:
    return torch.relu(bare.bn1(bare.conv1(images)))


def heads_at(network: localgrad.LocalNetwork, start: int, stop: int) -> list[nn.Module]:
    return list(network.auxiliary[f"{start}-{stop}"].heads)


# --- HPFF --------------------------------------------------------------------------------------------------------


class FourDecoders(nn.Module):
    """A decoder for each quadrant of the features, from it to the quadrant of the image; four losses, added up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.four = nn.ModuleList(ImageDecoder(channels) for _ in range(4))

    def loss(self, x: Tensor, pixels: Tensor) -> Tensor:
        total = x.new_zeros(())
        half, side = x.shape[2] // 2, pixels.shape[2] // 2
        for k, decoder in enumerate(self.four):
            row, column = divmod(k, 2)
            patch = x[:, :, row * half :, column * half :][:, :, :half, :half]
            wanted = pixels[:, :, row * side :, column * side :][:, :, :side, :side]
            patch = F.interpolate(patch, size=(side, side), mode="bilinear", align_corners=True)
            made = torch.sigmoid(decoder.conv2(torch.relu(decoder.norm(decoder.conv1(patch)))))
            total = total + binary_cross_entropy(made, wanted)
        return total


def test_hpff_over_infopro() -> None:
    """Windows of two from the second block on; single blocks have the bare label loss; ramps by the block's index."""
    method = hpff(infopro(TASK, image=(5.0, 1.0), label=(0.5, 0.1), released=True), released=True)
    network, bare, units = network_of(method, 2, stem=False)
    last = len(units) - 1
    assert sorted(network.auxiliary) == sorted(f"{a}-{k + 1}" for k in range(1, last) for a in (k, k - 1))
    singles, wholes, decoders = {}, {}, {}
    library = []
    for k in range(1, last):
        width = units[k].conv2.out_channels
        (single,), (whole, apart) = heads_at(network, k, k + 1), heads_at(network, k - 1, k + 1)
        singles[k], wholes[k] = (copied(label_head(width), one) for one in (single, whole))
        decoders[k] = copied(FourDecoders(width), apart)
        library += [single, whole, apart]
    own = [made[k] for k in range(1, last) for made in (singles, wholes, decoders)]

    def step(_: int) -> None:
        pixels, images, targets = data()
        x = stem_of(bare, images)
        y = x  # in the graph: the stem learns from the first window
        for k in range(last):
            x = units[k](x)
            if k == 0:
                x = x.detach()
                continue
            with buffers_kept(bare):
                y = units[k - 1](y)
                z = units[k](y)
                share = k / (last - 1)
                image, label = 5.0 * (1 - share) + 1.0 * share, 0.5 * (1 - share) + 0.1 * share
                window = image * decoders[k].loss(z, pixels) + label * F.cross_entropy(wholes[k](z), targets)
                (0.001 * F.cross_entropy(singles[k](x), targets) + 0.999 * window).backward()
            x, y = x.detach(), y.detach()
        x = units[last](x)
        (0.001 * F.cross_entropy(bare.fc(x.mean((2, 3))), targets)).backward()
        with buffers_kept(bare):
            z = units[last](units[last - 1](y))
            (0.999 * F.cross_entropy(bare.fc(z.mean((2, 3))), targets)).backward()

    train_both(network, bare, own, library, step)


# --- MLAAN -------------------------------------------------------------------------------------------------------


class LeapingHead(nn.Module):
    """Copies of later units in a row, beside the first one a second copy, then heads."""

    def __init__(self, sources: Sequence[nn.Module], frozen: bool) -> None:
        super().__init__()
        self.twin = copy.deepcopy(sources[0]).requires_grad_(not frozen)
        self.layers = nn.ModuleList(copy.deepcopy(source) for source in sources)

    def forward(self, z: Tensor) -> Tensor:
        z = self.layers[0](z) + self.twin(z)
        for layer in list(self.layers)[1:]:
            z = layer(z)
        return z


def leaps(bridge: nn.Module) -> nn.Module:
    """The library's bridge in the order of `LeapingHead`."""
    assert isinstance(bridge, MomentumBridge)
    return nn.ModuleList([bridge.twin, nn.ModuleList([bridge.companion, *bridge.later])])


def chain(units: list[nn.Module], block: int) -> list[nn.Module]:
    """The general rule for three stages: units that change form, then the middle and the last of the rest."""
    later = units[block + 1 :]
    changing = [k for k, unit in enumerate(later) if unit.conv1.stride[0] == 2]
    rest = later[changing[-1] + 1 if changing else 0 :]
    middle = [rest[(len(rest) - 1) // 2]] if len(rest) > 1 else []
    return [later[k] for k in changing] + middle + rest[-1:]


@pytest.mark.parametrize("width, base", [(2, "linear"), (3, "linear"), (3, "infopro")])
def test_mlaan(width: int, base: str) -> None:
    """The last window alone has weight 1; only the last twin moves, before the step; over InfoPro twins are trained."""
    image = base == "infopro"
    plain = infopro(TASK, image=IMAGE, label=LABEL) if image else dgl(TASK, head="linear")
    if width != 2:
        plain = windows(plain, width=width, local=0.001, cascade=0.999)
    network, bare, units = network_of(mlaan(plain, decay=DECAY, released=True), 2, stem=False)
    last = len(units) - 1
    ends = range(width - 1, last)
    assert sorted(network.auxiliary) == sorted(f"{a}-{k + 1}" for k in ends for a in (k, k - width + 1))
    independent: dict[int, list[nn.Module]] = {}
    cascade: dict[int, list[nn.Module]] = {}
    bridges: dict[int, LeapingHead] = {}
    library = []
    for k in ends:
        channels = units[k].conv2.out_channels
        alone, ahead = heads_at(network, k, k + 1), heads_at(network, k - width + 1, k + 1)
        bridge = leaps(network.auxiliary[f"{k - width + 1}-{k + 1}"].bridge)
        bridges[k] = LeapingHead(chain(units, k), frozen=not image).double()
        agree(bridges[k].parameters(), bridge.parameters())  # all of it starts at the source
        if image:
            independent[k] = [copied(label_head(channels, 128), alone[0]), copied(ImageDecoder(channels), alone[1])]
            cascade[k] = [copied(label_head(64), ahead[0]), copied(ImageDecoder(64), ahead[1])]
        else:
            independent[k], cascade[k] = (
                [copied(nn.Linear(channels, CLASSES), alone[0])],
                [copied(nn.Linear(64, CLASSES), ahead[0])],
            )
        library += [*alone, *ahead, bridge]
    own = [one for k in ends for one in (*independent[k], *cascade[k], bridges[k])]
    first_twins = {k: [p.clone() for p in bridges[k].twin.parameters()] for k in ends}

    def step(_: int) -> None:
        pixels, images, targets = data()

        def loss(k: int, h: Tensor, heads: list[nn.Module], contrast: bool) -> Tensor:
            if not image:
                return F.cross_entropy(heads[0](h.mean((2, 3))), targets)
            stage = int(math.log2(units[k].conv2.out_channels)) - 3  # of the block's own unit
            answer = heads[0](h)
            label = supervised_contrastive(answer, targets) if contrast else F.cross_entropy(answer, targets)
            return IMAGE[stage] * binary_cross_entropy(heads[1](h), pixels) + LABEL[stage] * label

        x = stem_of(bare, images)
        y = x
        for k in range(last):
            x = units[k](x)
            if k < width - 1:
                x = x.detach()
                continue
            with buffers_kept(bare):
                y = units[k - width + 1](y)
                z = y
                for unit in units[k - width + 2 : k + 1]:
                    z = unit(z)
                total = 0.001 * loss(k, x, independent[k], True) + 0.999 * loss(k, bridges[k](z), cascade[k], False)
                total.backward()
            x, y = x.detach(), y.detach()
        with torch.no_grad():
            units[last](x)  # moves the running statistics
        with buffers_kept(bare):
            for unit in units[-width:]:
                y = unit(y)
            F.cross_entropy(bare.fc(y.mean((2, 3))), targets).backward()
        follow(bridges[last - 1].twin, chain(units, last - 1)[0], DECAY)

    train_both(network, bare, own, library, step)
    for k in ends:
        moved = not all(torch.equal(a, b) for a, b in zip(first_twins[k], bridges[k].twin.parameters(), strict=True))
        assert moved == (image or k == last - 1)


# --- MAN and MAN++ -----------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """A learnable unit and a frozen one, added; for MAN++ weighted by a scalar and by 2 less it."""

    def __init__(self, bridge: MomentumBridge) -> None:
        super().__init__()
        self.twin, self.companion = copy.deepcopy(bridge.twin), copy.deepcopy(bridge.companion)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64)) if bridge.mix == "scaled" else None

    def forward(self, x: Tensor) -> Tensor:
        assert self.twin is not None and self.companion is not None
        if self.scale is None:
            return self.companion(x) + self.twin(x)
        return self.scale * self.companion(x) + (2 - self.scale) * self.twin(x)


def beside(bridge: MomentumBridge) -> nn.Module:
    """The library's bridge in the order of `Beside`."""
    made = nn.Module()
    if bridge.mix == "scaled":
        made.scale = bridge.scale
    made.twin, made.companion = bridge.twin, bridge.companion
    return made


@pytest.mark.parametrize("plugin, stem", [(man, False), (man_pp, True)])
def test_man_over_infopro(plugin: Callable[..., Method], stem: bool) -> None:
    """Weights by the stage of the unit that is copied; twins drawn apart; MAN++'s stem has a contrastive label head."""
    method = plugin(infopro(TASK, image=IMAGE, label=LABEL), decay=DECAY, released=True)
    network, bare, units = network_of(method, 2, stem)
    blocks = len(units) + stem
    assert sorted(network.auxiliary) == [f"{k}-{k + 1}" for k in range(blocks - 1)]
    bridges, heads, library = [], [], []
    for k in range(blocks - 1):
        found = network.auxiliary[f"{k}-{k + 1}"]
        ahead = units[k + (not stem)]
        assert isinstance(found.bridge, MomentumBridge)
        twin, source = found.bridge.twin, ahead
        assert twin is not None and not torch.equal(twin.conv1.weight, source.conv1.weight)
        channels = ahead.conv2.out_channels
        contrastive = stem and k == 0
        label, decoder = found.heads
        bridges.append(Beside(found.bridge))
        heads.append(
            [
                copied(label_head(channels, 128 if contrastive else CLASSES), label),
                copied(ImageDecoder(channels), decoder),
            ]
        )
        library += [beside(found.bridge), label, decoder]
    own = [one for bridge, pair in zip(bridges, heads, strict=True) for one in (bridge, *pair)]

    def step(_: int) -> None:
        pixels, images, targets = data()
        x = stem_of(bare, images)
        passed = units if stem else units[1:]
        if not stem:
            x = units[0](x)
        for k, ahead in enumerate(passed):
            y = bridges[k](x)
            stage = int(math.log2(ahead.conv2.out_channels)) - 3
            if stem and k == 0:
                stage, about_label = 0, supervised_contrastive(heads[0][0](y), targets)
            else:
                about_label = F.cross_entropy(heads[k][0](y), targets)
            about_image = binary_cross_entropy(heads[k][1](y), pixels)
            (IMAGE[stage] * about_image + LABEL[stage] * about_label).backward()
            follow(bridges[k].twin, ahead, DECAY)
            x = ahead(x.detach())
        F.cross_entropy(bare.fc(x.mean((2, 3))), targets).backward()

    train_both(network, bare, own, library, step)


# --- how it all starts -------------------------------------------------------------------------------------------


def convolutions(module: nn.Module) -> Iterator[nn.Conv2d]:
    return (one for one in module.modules() if isinstance(one, nn.Conv2d))


@pytest.mark.parametrize(
    "method",
    [
        auglocal(TASK, released=True),
        infopro(TASK, released=True),
        predsim(TASK, released=True),
        man(infopro(TASK, head="2c2f"), released=True),
        man_pp(dgl(TASK), depth=2, released=True),
        hpff(infopro(TASK), released=True),
        kaiming(man(dgl(TASK))),
    ],
    ids=lambda method: method.name,
)
def test_convolutions_start_with_the_released_deviation(method: Method) -> None:
    """N(0, 2 / (k^2 C_out)) in every convolution of all auxiliary networks, whatever the device says; never twice."""
    torch.manual_seed(0)
    network = localgrad.localize(CifarResNet(32, 10), method, 8, example=data(2)[1].float())
    found = 0
    for one in convolutions(network.auxiliary):
        expected = math.sqrt(2 / (one.kernel_size[0] * one.kernel_size[1] * one.out_channels))
        count = one.weight.numel()
        assert abs(one.weight.std().item() / expected - 1) < 5 / math.sqrt(2 * count)
        assert one.weight.abs().max() > 2 * expected or count < 200  # of no bounded distribution
        found += 1
    assert found > 6
    weights = [one.weight.flatten()[:50] for one in convolutions(network.auxiliary)]
    assert not any(torch.equal(a, b) for a, b in pairwise(weights) if a.shape == b.shape)


def test_the_default_is_narrower_by_the_factor_in_the_docstring() -> None:
    torch.manual_seed(0)
    images = data(2)[1].float()
    for method, factor in ((dgl(TASK), math.sqrt(6)), (kaiming(dgl(TASK)), 1.0)):
        network = localgrad.localize(CifarResNet(32, 10), method, 2, example=images)
        for one in convolutions(network.auxiliary):
            expected = math.sqrt(2 / one.out_channels) / factor
            assert abs(one.weight.std().item() / expected - 1) < 0.1


def test_leaps_start_at_their_source() -> None:
    network, _, _ = network_of(mlaan(dgl(TASK, head="linear"), released=True), 2, stem=False)
    for auxiliary in network.auxiliary.values():
        if auxiliary.bridge is not None:
            assert isinstance(auxiliary.bridge, MomentumBridge)
            (twin,) = auxiliary.bridge.twins
            agree(twin.copy.parameters(), twin.source.parameters())
            assert auxiliary.bridge.companion is not None
            agree(auxiliary.bridge.companion.parameters(), twin.source.parameters())


def test_weights_are_drawn_on_the_cpu() -> None:
    """With a default device that has no numbers at all, heads still have those of the seed."""
    images = data(2)[1].float()
    drawn = []
    for device in ("cpu", "meta"):
        model = CifarResNet(14, CLASSES)
        torch.manual_seed(0)
        with torch.device(device):
            network = localgrad.localize(model, kaiming(man(dgl(TASK))), 3, example=images)
        drawn.append(list(network.auxiliary.parameters()))
    assert all(a.device.type == "cpu" and a.shape == b.shape for a, b in zip(*drawn, strict=True))
    # Companions and heads; twins start at the models' own weights.
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True) if a.requires_grad)


def test_a_loss_without_a_released_form_is_refused() -> None:
    with pytest.raises(localgrad.MethodError, match="no form for Similarity"):
        hpff(predsim(TASK), released=True)


def test_a_head_that_the_release_builds_otherwise_is_refused() -> None:
    with pytest.raises(localgrad.MethodError, match="skips a stage"):
        localgrad.localize(
            CifarResNet(14, CLASSES), auglocal(TASK, depth=1, released=True), 7, example=data(2)[1].float()
        )
