"""Signals (B, C, L) and volumes (B, C, D, H, W): every method on them, every head on them, and how they are told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
import zoo
from localgrad import heads
from localgrad.errors import MethodError, PartitionError, TrainingError
from localgrad.heads import imagenet
from localgrad.layout import LAYERS, Layout, Pool, ToMaps, layout_of
from localgrad.losses import AttentionTransfer, Reconstruction
from localgrad.method import Method, Term
from localgrad.partition import Partition
from localgrad.site import HeadBuilder, Site
from localgrad.spans import Local
from localgrad.task import Batch
from localgrad.tasks.normalisation import pixels_of
from localgrad.testing import assert_isolated

CLASSES = 4
TASK = localgrad.tasks.classification(CLASSES, mean=(0.5,), std=(0.25,))


# --- networks ---------------------------------------------------------------------------------------------------------


def layer(sides: int, inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    by = LAYERS[sides]
    convolution = by.conv(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, by.batch_norm(outputs), nn.ReLU(inplace=True))


class Audio(nn.Module):
    """Raw audio (B, 1, L): a strided convolution, then three stages of four layers with pooling between, as M11 has.

    Source: Dai et al., 2016, arXiv:1610.00087.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        stem = [nn.Conv1d(1, width, 16, 4, 6, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(2)]
        self.stem = nn.Sequential(*stem)
        widths = [width, width, 2 * width, 4 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*(layer(1, a if k == 0 else b, b) for k in range(4)), nn.MaxPool1d(2))
                for a, b in pairwise(widths)
            )
        )
        self.fc = nn.Linear(widths[-1], CLASSES)

    def forward(self, audio: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(audio)).mean(2))


class Unit(nn.Module):
    """A residual unit of r3d_18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = layer(3, inputs, outputs, stride)
        self.second = nn.Sequential(nn.Conv3d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs))
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv3d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class Video(nn.Module):
    """r3d_18 of three stages and few channels."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = layer(3, 3, width)
        self.stage1 = nn.Sequential(Unit(width, width, 1), Unit(width, width, 1))
        self.stage2 = nn.Sequential(Unit(width, 2 * width, 2), Unit(2 * width, 2 * width, 1))
        self.stage3 = nn.Sequential(Unit(2 * width, 4 * width, 2), Unit(4 * width, 4 * width, 1))
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, clips: Tensor) -> Tensor:
        return self.fc(self.stage3(self.stage2(self.stage1(self.stem(clips)))).mean((2, 3, 4)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "audio": (Audio, (1, 128)),
    "video": (Video, (3, 4, 8, 8)),
}


def data(kind: str) -> tuple[Tensor, Tensor]:
    """One pattern for each class, and noise."""
    generator = torch.Generator().manual_seed(0)
    shape = NETWORKS[kind][1]
    labels = torch.arange(8) % CLASSES
    patterns = torch.randn(CLASSES, *shape, generator=generator)
    return patterns[labels] + 0.1 * torch.randn(8, *shape, generator=generator), labels


def methods(kind: str) -> dict[str, Method]:
    """Every base, and every plug-in over DGL."""
    torch.manual_seed(1)
    required = {"feature_distillation": {"teacher": NETWORKS[kind][0]()}}
    found = {}
    for name in localgrad.methods.__all__:
        make = getattr(localgrad.methods, name)
        found[name] = make(TASK, **required.get(name, {})) if zoo.is_base(name) else make(localgrad.methods.dgl(TASK))
    return found


def train(network: localgrad.LocalNetwork, inputs: Tensor, labels: Tensor, steps: int) -> list[float]:
    """The sum of all losses at each step."""
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        found.append(sum(float(loss) for loss in localgrad.backward(network, inputs, labels, step=step).values()))
        optimizer.step()
        localgrad.exchange(network)
    return found


# --- every method trains them -----------------------------------------------------------------------------------------

REFUSED = {("audio", "trgl"): "no residual branches"}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", localgrad.methods.__all__)
def test_every_method_trains_or_says_why_not(name: str, kind: str) -> None:
    method = methods(kind)[name]
    torch.manual_seed(0)
    build, (inputs, labels) = NETWORKS[kind][0], data(kind)
    if (kind, name) in REFUSED:
        with pytest.raises(MethodError, match=REFUSED[kind, name]):
            localgrad.localize(build(), method, 3, example=inputs)
        return
    network = localgrad.localize(build(), method, 3, example=inputs)
    losses = train(network, inputs, labels, 2)
    assert all(map(math.isfinite, losses))
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


SMALL: dict[str, Callable[[], Method]] = {
    "dgl": lambda: localgrad.methods.dgl(TASK),
    "man_pp": lambda: localgrad.methods.man_pp(localgrad.methods.dgl(TASK, head="linear")),
    "infopro": lambda: localgrad.methods.infopro(TASK, head={"mlp": {"hidden": 16, "layers": 1}}),
    "lean": lambda: localgrad.methods.lean(TASK, depth=1),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", SMALL)
def test_gradients_stay_in_their_block_and_losses_fall(name: str, kind: str) -> None:
    torch.manual_seed(0)
    build, (inputs, labels) = NETWORKS[kind][0], data(kind)
    network = localgrad.localize(build(), SMALL[name](), 3, example=inputs)
    assert_isolated(network, inputs, labels)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (network.auxiliary, network.model)]
    assert 0 < sizes[0] < sizes[1]
    losses = train(network, inputs, labels, 8)
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.9 * losses[0]


def test_torchvisions_r3d_18_is_trained_by_heads_smaller_than_it() -> None:
    from torchvision.models.video import r3d_18

    torch.manual_seed(0)
    model = r3d_18(weights=None, num_classes=CLASSES)
    inputs, labels = torch.randn(2, 3, 4, 16, 16), torch.tensor([0, 1])
    whole = sum(p.numel() for p in model.parameters())
    for method in (localgrad.methods.dgl(TASK), localgrad.methods.infopro(TASK)):
        network = localgrad.localize(model, method, ("layer2", "layer3"), example=inputs)
        assert all(math.isfinite(loss) for loss in localgrad.backward(network, inputs, labels).values())
        assert sum(p.numel() for p in network.auxiliary.parameters()) < 0.1 * whole


class UNet(nn.Module):
    """Two levels; answers with logits at half of the sides."""

    def __init__(self, sides: int) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = layer(sides, 2, 8, 2), layer(sides, 8, 16), layer(sides, 16, 16)
        self.pool, self.up = LAYERS[sides].average_pool(2), nn.Upsample(scale_factor=2)
        self.up2, self.out = layer(sides, 32, 8), LAYERS[sides].conv(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down2(self.down1(x))
        return self.out(self.up2(torch.cat([skip, self.up(self.down3(self.pool(skip)))], 1)))


@pytest.mark.parametrize("shape", [(32,), (4, 8, 16)], ids=["signals", "volumes"])
def test_segmentation(shape: tuple[int, ...]) -> None:
    """Skips are found as in maps; heads answer at their own grid; losses and scores are those of all positions."""
    task = localgrad.tasks.segmentation(CLASSES)
    torch.manual_seed(0)
    inputs, masks = torch.randn(4, 2, *shape), torch.randint(CLASSES, (4, *shape))
    masks[0, 0] = 255
    cuts = [[cut.name for cut in Partition(UNet(n), torch.randn(4, 2, *[8] * n)).cuts] for n in (len(shape), 2)]
    assert cuts[0] == cuts[1] == ["down2", "down3", "up2", "out"]
    network = localgrad.localize(UNet(len(shape)), localgrad.methods.dgl(task), ("down3", "up2"), example=inputs)
    losses = train(network, inputs, masks, 4)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    logits = network.model(inputs).detach()
    mode = {1: "linear", 3: "trilinear"}[len(shape)]
    whole = F.interpolate(logits, size=shape, mode=mode, align_corners=False)
    expected = F.cross_entropy(whole, masks, ignore_index=255)
    torch.testing.assert_close(task.loss(logits, Batch(inputs, masks, 0)), expected)
    counted = masks != 255
    right = (whole.argmax(1) == masks) & counted
    torch.testing.assert_close(task.score(whole, masks), right.flatten(1).sum(1) / counted.flatten(1).sum(1))
    metric = task.metric()
    metric.update(logits, masks)
    assert metric.compute()["pixel_accuracy"] == pytest.approx((right.sum() / counted.sum()).item())
    with pytest.raises(TrainingError, match="as many sides"):
        task.loss(logits, Batch(inputs, masks[..., None], 0))


# --- every head reads them --------------------------------------------------------------------------------------------

HEADS: dict[str, HeadBuilder] = {
    "AttentionMap": heads.AttentionMap(),
    "Conv": heads.Conv(CLASSES, "2c2f"),
    "Critic": heads.Critic(CLASSES),
    "Decoder": heads.Decoder(),
    "Decoder at half": heads.Decoder(scale=0.5),
    "FCN": heads.FCN(CLASSES, dropout=0.0),
    "Linear": heads.Linear(CLASSES),
    "MLP": heads.MLP(CLASSES),
    "Patches": heads.Patches(heads.Conv(CLASSES)),
    "Patches of maps": heads.Patches(heads.Projection(), shared=False),
    "PooledLinear": heads.PooledLinear(CLASSES, 20, zeroed=False),
    "Projection": heads.Projection(),
    "Remaining": heads.Remaining(heads.Linear(CLASSES), tail=1),
    "imagenet.Classifier": imagenet.Classifier(CLASSES),
    "imagenet.Decoder": imagenet.Decoder(),
    "imagenet.Pointwise": imagenet.Pointwise(CLASSES),
}


def site_in(sides: tuple[int, ...]) -> Site:
    """The site after the first layer of a network for inputs with 3 channels and those sides."""
    sites: list[Site] = []

    def noting(site: Site) -> nn.Module:
        sites.append(site)
        return heads.Linear(1)(site)

    n = len(sides)
    torch.manual_seed(0)
    model = nn.Sequential(
        layer(n, 3, 8, 2), layer(n, 8, 8), layer(n, 8, 16, 2), LAYERS[n].adaptive_pool(1), nn.Flatten(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip
    method = Method("noting", TASK, (Term(noting, lambda out, _: out.square().mean()),), Local())
    localgrad.localize(model, method, ("1",), example=torch.randn(4, 3, *sides))
    return replace(sites[0], features=sites[0].features.detach())


def built(head: HeadBuilder, site: Site) -> nn.Module:
    torch.manual_seed(0)
    return head(site).double().train()


def answer(head: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """What a head answers in float64, and a gradient with respect to the features."""
    features = features.double().requires_grad_()
    output = head(features)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.numel(), dtype=torch.float64, generator=generator).reshape(output.shape)
    (gradient,) = torch.autograd.grad((output * weights).sum(), features)
    return output, gradient


@pytest.mark.parametrize("sides, flat", [((12,), (12, 1)), ((1, 12, 8), (12, 8))], ids=["signals", "volumes"])
@pytest.mark.parametrize("name", sorted(set(HEADS) - {"Patches", "Patches of maps"}))  # a side of 1 is not divided
def test_heads_are_those_of_maps_where_a_side_is_1(name: str, sides: tuple[int, ...], flat: tuple[int, ...]) -> None:
    """A kernel of n sides is the middle of one of n + 1, what lies beside it reads zeros."""
    own, maps = site_in(sides), site_in(flat)
    assert own.layout.grid == ((6,) if len(sides) == 1 else (1, 6, 4)) and maps.layout.grid[0] == 6
    head, reference = built(HEADS[name], own), built(HEADS[name], maps)
    pairs = zip(head.parameters(), reference.parameters(), strict=True)
    for ours, theirs in pairs:
        wide, narrow = (ours, theirs) if ours.dim() > theirs.dim() else (theirs, ours)
        assert ours.dim() <= 2 or (wide.dim() == narrow.dim() + 1 and narrow.shape[2:].numel() <= 9)
        with torch.no_grad():
            if ours.dim() <= 2:
                theirs.copy_(ours)
                continue
            middle = wide.select(2 if wide is ours else -1, wide.shape[-1] // 2)
            wide.zero_()
            middle.copy_(torch.randn(narrow.shape, dtype=torch.float64))
            narrow.copy_(middle)
    features = torch.randn(4, 8, *own.layout.grid)
    output, gradient = answer(head, features)
    expected, expected_gradient = answer(reference, features.reshape(4, 8, *maps.layout.grid))
    assert output.dim() == 2 or output.shape[2:] != expected.shape[2:]
    torch.testing.assert_close(output.flatten(), expected.flatten(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient.flatten(), expected_gradient.flatten(), rtol=1e-9, atol=1e-11)


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """BatchNorm and ReLU."""
    axes = [0, *range(2, x.dim())]
    shape = (1, -1, *[1] * (x.dim() - 2))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return F.relu((x - mean) / (variance + 1e-5).sqrt() * weight.reshape(shape) + bias.reshape(shape))


@pytest.mark.parametrize("sides", [(32,), (4, 12, 8)], ids=["signals", "volumes"])
def test_heads_against_a_literal_reference(sides: tuple[int, ...]) -> None:
    site = site_in(sides)
    n, grid = len(sides), site.layout.grid
    conv: Any = {1: F.conv1d, 3: F.conv3d}[n]
    positions = tuple(range(2, 2 + n))
    features = torch.randn(4, 8, *grid)

    def label(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        w, scale, shift, w1, b1, w2, b2 = parameters
        x = normalised(conv(x, w, stride=2, padding=1), scale, shift)
        return F.relu(x.mean(positions) @ w1.T + b1) @ w2.T + b2

    def pooled(x: Tensor, size: Callable[[int], int]) -> Tensor:
        for axis in positions:
            side = size(x.shape[axis])
            x = x.unflatten(axis, (side, -1)).mean(axis + 1)
        return x

    def mlp(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        w, scale, shift, w1, b1, scale1, shift1, w2, b2 = parameters
        x = pooled(x, lambda side: -(-side // 4))
        x = pooled(
            normalised(torch.einsum("oi,bi...->bo...", w.flatten(1), x), scale, shift), lambda side: min(side, 2)
        )
        return normalised(x.flatten(1) @ w1.T + b1, scale1, shift1) @ w2.T + b2

    def decoder(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        w, b, scale, shift, w1, b1 = parameters
        for axis, side in zip(positions, sides, strict=True):  # linear along one side after the other
            own = x.shape[axis]
            at = torch.arange(side, dtype=torch.float64) * (own - 1) / (side - 1)
            left = at.floor().long().clamp(max=own - 2)
            share = (at - left).reshape(-1, *[1] * (x.dim() - 1 - axis))
            x = x.index_select(axis, left) * (1 - share) + x.index_select(axis, left + 1) * share
        return conv(normalised(conv(x, w, b, padding=1), scale, shift), w1, b1, padding=1)

    literal: list[tuple[HeadBuilder, Callable[[Tensor, Sequence[Tensor]], Tensor]]] = [
        (heads.Conv(CLASSES), label),
        (heads.MLP(CLASSES, 1, 1), mlp),
        (heads.Decoder(), decoder),
    ]
    for builder, reference in literal:
        head = built(builder, site)
        found = answer(head, features)
        expected = answer(_Literal(reference, list(head.parameters())), features)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


class _Literal(nn.Module):
    def __init__(self, function: Callable[[Tensor, Sequence[Tensor]], Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self.function, self.values = function, values

    def forward(self, features: Tensor) -> Tensor:
        return self.function(features, self.values)


@pytest.mark.parametrize("sides", [(24,), (4, 12, 8)], ids=["signals", "volumes"])
def test_patches_are_read_one_by_one(sides: tuple[int, ...]) -> None:
    site = site_in(sides)
    grid, n = site.layout.grid, len(sides)
    head = built(heads.Patches(heads.Projection()), site)
    kernel = next(head.parameters())
    conv: Any = {1: F.conv1d, 3: F.conv3d}[n]
    features = torch.randn(4, 8, *grid, dtype=torch.float64)
    expected = torch.zeros_like(features)
    for corner in torch.cartesian_prod(*[torch.arange(2)] * n).reshape(-1, n).tolist():
        halves = [slice(k * side // 2, (k + 1) * side // 2) for k, side in zip(corner, grid, strict=True)]
        place = (slice(None), slice(None), *halves)
        expected[place] = conv(features[place], kernel, padding=1)
    torch.testing.assert_close(head(features), expected)
    apart = built(heads.Patches(heads.Projection(), shared=False), site)
    assert len(list(apart.parameters())) == 2**n


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"Linear", "Remaining"}))  # LayerNorm; copies of other units
def test_volumes_with_channels_last_are_read_as_those_with_channels_first(name: str) -> None:
    site = site_in((4, 12, 8))
    last = replace(
        site,
        features=site.features.movedim(1, -1),
        cut=replace(site.cut, shape=tuple(site.features.movedim(1, -1).shape), channels_hint="last"),
    )
    assert last.layout == replace(site.layout, kind="channels_last")
    features = torch.randn(4, 8, *site.layout.grid)
    output, gradient = answer(built(HEADS[name], site), features)
    found, found_gradient = answer(built(HEADS[name], last), features.movedim(1, -1))
    torch.testing.assert_close(found, output, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found_gradient.movedim(-1, 1), gradient, rtol=1e-9, atol=1e-11)


def test_a_convolution_on_signals_has_a_kernel_of_3() -> None:
    """On maps of width 1 two thirds of a 3x3 kernel would read nothing but padding."""
    kernels = [p.shape for p in built(heads.Conv(CLASSES, "2c1f"), site_in((24,))).parameters() if p.dim() == 3]
    assert kernels == [(16, 8, 3), (16, 16, 3)]


@pytest.mark.parametrize("sides, pooled", [((24,), (6,)), ((4, 12, 8), (1, 3, 2))], ids=["signals", "volumes"])
def test_pooling_before_heads(sides: tuple[int, ...], pooled: tuple[int, ...]) -> None:
    site = site_in(sides)
    pool = localgrad.bridges.Pool(2)(site)
    assert pool is not None and localgrad.bridges.Pool(2, least=100)(site) is None
    found = pool(site.features)
    assert found.shape[2:] == pooled
    torch.testing.assert_close(found.mean(), site.features.mean())


@pytest.mark.filterwarnings("ignore:block 1:UserWarning")
def test_a_decoder_refuses_positions_that_the_inputs_do_not_have() -> None:
    class Spectrogram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(layer(2, 1, 8), layer(2, 8, 8))
            self.fc = nn.Linear(8, CLASSES)

        def forward(self, audio: Tensor) -> Tensor:
            return self.fc(self.layers(audio.unflatten(2, (8, 16))).mean((2, 3)))

    with pytest.raises(MethodError, match=r"grid \(8, 16\), but the inputs have the shape \(4, 1, 128\).*such as dgl"):
        localgrad.localize(Spectrogram(), localgrad.methods.infopro(TASK), 2, example=torch.randn(4, 1, 128))
    words = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(80, CLASSES))
    with pytest.raises(MethodError, match="such as dgl"):
        localgrad.localize(words, localgrad.methods.infopro(TASK), ("1",), example=torch.randint(9, (4, 10)))


def test_detection_heads_refuse_volumes() -> None:
    with pytest.raises(MethodError, match="retinanet"):
        heads.Detection()(site_in((4, 12, 8)))


@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 2, 4, 5), (3, 2, 3, 4, 5)])
def test_pixels_are_normalised_back_along_channels(shape: tuple[int, ...]) -> None:
    pixels = torch.rand(shape)
    mean, std = (0.2, 0.7), (0.5, 0.25)
    inputs = torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(2)], 1)
    torch.testing.assert_close(pixels_of(inputs, mean, std), pixels)
    loss = Reconstruction(localgrad.tasks.classification(2, mean=mean, std=std))
    found = loss(pixels.logit(1e-6), Batch(inputs, None, 0))
    torch.testing.assert_close(found, F.binary_cross_entropy(pixels.clamp(1e-6, 1 - 1e-6), pixels))


def test_attention_maps_of_other_dimensions_are_not_compared() -> None:
    context: Any = "teacher"
    batch = Batch(None, None, 0, boundary=1, context={context: [torch.rand(2, 1, 4, 4)]})
    with pytest.raises(TrainingError, match="name layers"):
        AttentionTransfer(context)(torch.rand(2, 1, 16), batch)
    signals = torch.rand(2, 1, 8)
    batch = Batch(None, None, 0, boundary=1, context={context: [signals]})
    pooled = signals.unflatten(2, (4, 2)).mean(3)
    assert AttentionTransfer(context)(pooled, batch).item() == pytest.approx(0.0, abs=1e-6)


# --- how layouts are told ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(grid=st.lists(st.integers(1, 5), min_size=1, max_size=3), channels=st.integers(1, 5), scale=st.integers(1, 3))
def test_permuted_features_are_the_same_for_the_right_hint(grid: list[int], channels: int, scale: int) -> None:
    features = torch.randn(2, channels, *grid, generator=torch.Generator().manual_seed(0))
    inputs = torch.zeros(2, 3, *(scale * side for side in grid))
    forms = [(features, "first"), (features.movedim(1, -1), "last")]
    if len(grid) == 2:
        forms.append((features.flatten(2).transpose(1, 2), "last"))
    for form, hint in forms:
        layout = layout_of(form, inputs, hint)
        assert (layout.channels, layout.grid, layout.prefix) == (channels, tuple(grid), 0)
        assert torch.equal(ToMaps(layout)(form), features)
        torch.testing.assert_close(Pool(layout)(form), features.flatten(2).mean(2))


def test_words_may_have_any_number() -> None:
    layout = layout_of(torch.zeros(2, 7, 3), torch.zeros(2, 7))
    assert layout == Layout("tokens", 3, (7,))
    assert ToMaps(layout)(torch.zeros(2, 9, 3)).shape == (2, 3, 9)


class Opaque(nn.Module):
    """A matrix product along one side of (B, ., .), that no layer of torch does."""

    def __init__(self, width: int, equation: str) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width) / width)
        self.equation = equation

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.matrix)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.GRU(6, 6, batch_first=True), nn.GRU(6, 6, batch_first=True)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.one(x)[0])[0].mean(1))


class Transcriber(nn.Module):
    """Convolutions, then a recurrent layer that takes signals as words."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Conv1d(3, 6, 3, padding=1)
        self.words = Words()
        self.fc = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.words(F.max_pool1d(self.convolutions(x), 2)).mean(1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 5, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2))[0]


def read_out(width: int, signals: bool) -> list[nn.Module]:
    pool = [nn.AdaptiveAvgPool1d(1), nn.Flatten()] if signals else [nn.Flatten()]
    return [*pool, nn.LazyLinear(width)]


SIGNALS = Layout("maps", 6, (10,))
TOKENS = Layout("tokens", 6, (10,))
TOLD: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int], Layout]] = {
    "before pooling": (
        lambda: nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 6, 3),
                              *read_out(CLASSES, True)), "2", (6, 10), SIGNALS),
    "before an activation": (
        lambda: nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 6, 3),
                              *read_out(CLASSES, True)), "1", (6, 10), SIGNALS),
    "as long as wide": (
        lambda: nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 6, 3), *read_out(CLASSES, True)),
        "2", (6, 6), Layout("maps", 6, (6,))),
    "instance norm": (
        lambda: nn.Sequential(Opaque(6, "bcl,cd->bdl"), nn.InstanceNorm1d(6, affine=True), Opaque(6, "bcl,cd->bdl"),
                              *read_out(CLASSES, True)), "2", (6, 10), SIGNALS),
    "norm over both sides": (
        lambda: nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.LayerNorm((6, 10)), nn.Conv1d(6, 6, 3),
                              *read_out(CLASSES, True)), "2", (6, 10), SIGNALS),
    "pooling alone": (
        lambda: nn.Sequential(Opaque(6, "bcl,cd->bdl"), nn.AvgPool1d(1), Opaque(6, "bcl,cd->bdl"), nn.Flatten(),
                              nn.Linear(60, CLASSES)), "2", (6, 10), SIGNALS),
    "weights of its own, first": (
        lambda: nn.Sequential(Opaque(6, "bcl,cd->bdl"), Opaque(6, "bcl,cd->bdl"), nn.Flatten(),
                              nn.Linear(60, CLASSES)), "1", (6, 10), SIGNALS),
    "weights of its own, last": (
        lambda: nn.Sequential(Opaque(6, "btc,cd->btd"), Opaque(6, "btc,cd->btd"), nn.Flatten(),
                              nn.Linear(60, CLASSES)), "1", (10, 6), TOKENS),
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), *read_out(CLASSES, False)), "1", (10, 6),
        TOKENS),
    "norm without weights": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 6),
                              *read_out(CLASSES, False)), "2", (10, 6), TOKENS),
    "signals that are transposed for a recurrent layer": (Transcriber, "words", (3, 20), SIGNALS),
    "recurrent": (Recurrent, "two", (10, 6), TOKENS),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:block 1:UserWarning")  # two layers are cut unevenly
@pytest.mark.parametrize("name", TOLD)
def test_what_the_layers_do_tells_signals_from_tokens(name: str) -> None:
    build, cut, shape, layout = TOLD[name]
    sites: list[Site] = []

    def noting(site: Site) -> nn.Module:
        sites.append(site)
        return heads.Linear(CLASSES)(site)

    torch.manual_seed(0)
    model, inputs = build(), torch.randn(4, *shape)
    model(inputs)  # lazy layers
    method = Method("noting", TASK, (Term(noting, TASK.loss),), Local())
    localgrad.localize(model, method, (cut,), example=inputs)
    assert sites[0].layout == layout


def test_what_nothing_tells_is_refused() -> None:
    def model() -> nn.Module:
        return nn.Sequential(Opaque(6, "bcl,cd->bdl"), Opaque(6, "bcl,cd->bdl"), nn.Flatten(), nn.LazyLinear(CLASSES))

    method = localgrad.methods.dgl(TASK)
    square = model()
    square(inputs := torch.randn(4, 6, 6))
    with pytest.raises(PartitionError, match=r"signals \(B, C, L\) or tokens \(B, T, C\).*differ in length"):
        localgrad.localize(square, method, ("1",), example=inputs)
    longer = model()
    longer(inputs := torch.randn(4, 6, 10))
    localgrad.localize(longer, method, ("1",), example=inputs)


def test_a_teacher_of_signals_is_read_as_such() -> None:
    torch.manual_seed(0)
    inputs, labels = data("audio")
    teacher = Audio().requires_grad_(False)  # frozen, as teachers are
    for layers in (None, ("stages.1", "stages.2")):
        method = localgrad.methods.feature_distillation(TASK, teacher=teacher, layers=layers)
        network = localgrad.localize(Audio(), method, 3, example=inputs)
        maps = method.contexts[0](network, Batch(inputs, labels, 0))
        stem = teacher.stem(inputs)
        first = Partition(Audio(), inputs).named(("stages.1",))[0].shape[2]
        assert maps[0].shape[:2] == (8, 1)
        if layers is not None:
            assert maps[0].shape == (8, 1, first)
            torch.testing.assert_close(maps[0], teacher.stages[0](stem).square().mean(1, keepdim=True))


# --- heads larger than the model --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default:the auxiliary network:UserWarning")
def test_a_head_larger_than_the_model_is_a_warning() -> None:
    inputs, _ = data("audio")
    large = localgrad.methods.dgl(TASK, head={"mlp": {"hidden": 500}})
    with pytest.warns(UserWarning) as found:
        localgrad.localize(Audio(), large, 3, example=inputs)
    assert len(found) == 1
    said = str(found[0].message)
    whole = sum(p.numel() for p in Audio().parameters())
    assert said.startswith("the auxiliary network after block 1 has") and f"{whole:,} of the whole Audio" in said
    assert "MLP" in said and "head='linear'" in said


@pytest.mark.filterwarnings("error:the auxiliary network:UserWarning")
def test_heads_smaller_than_the_model_are_none() -> None:
    inputs, _ = data("audio")
    localgrad.localize(Audio(), localgrad.methods.dgl(TASK), 3, example=inputs)
    localgrad.localize(Audio(), localgrad.methods.e2e(TASK), 3, example=inputs)
