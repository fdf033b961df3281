"""HPFF again, literally: windows run again from detached features, heads on four quadrants cut out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_man import buffers_kept, train_both
from test_papers import (
    CLASSES,
    TASK,
    ImageDecoder,
    MlpSR,
    OneConvTwoLinear,
    binary_cross_entropy,
    copied,
    data,
    segments,
)
from test_pgl import trained
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.methods import auglocal, dgl, hpff, infopro, windows

WIDTHS = {1: 16, 2: 32}  # channels at each boundary
SIDES = {1: 16, 2: 8}  # of the features there
Objective = Callable[[int, int, Tensor, Tensor, Tensor], Tensor]  # start, stop, features, pixels, targets
SPANS = ((0, 1), (1, 2), (0, 2))  # that end inside the network: single blocks, and the windows of two


def quadrants(x: Tensor) -> list[Tensor]:
    """Upper left, upper right, lower left, lower right."""
    h, w = x.shape[2] // 2, x.shape[3] // 2
    return [x[:, :, :h, :w], x[:, :, :h, w:], x[:, :, h:, :w], x[:, :, h:, w:]]


def on_quadrants(head: nn.Module, x: Tensor) -> list[Tensor]:
    """What the head answers for each quadrant, all four as one batch."""
    return list(head(torch.cat(quadrants(x))).chunk(4))


def mean_of_four(head: nn.Module, x: Tensor) -> Tensor:
    a, b, c, d = on_quadrants(head, x)
    return (a + b + c + d) / 4


def stitched(decoder: nn.Module, x: Tensor) -> Tensor:
    a, b, c, d = on_quadrants(decoder, x)
    return torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)


class QuadrantDecoder(ImageDecoder):
    """As `ImageDecoder`, from a quadrant of the features to one of the image."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=True)
        return torch.sigmoid(self.conv2(torch.relu(self.norm(self.conv1(x)))))


def network_of(method: localgrad.Method) -> tuple[localgrad.LocalNetwork, nn.Module]:
    torch.manual_seed(0)
    model = localgrad.models.resnet8(CLASSES).double()
    network = localgrad.localize(model, method, ("layer2", "layer3"), example=data(2)[1])
    assert set(network.auxiliary) == {f"{start}-{stop}" for start, stop in SPANS}
    return network, copy.deepcopy(model)


def run_levels(bare: nn.Module, independent: float, cascade: float, objective: Objective) -> None:
    """Blocks one by one, then every window of two again from the detached features before it."""
    pixels, images, targets = data()
    blocks = segments(bare)
    features = [images]

    def loss(start: int, stop: int, h: Tensor) -> Tensor:
        return F.cross_entropy(h, targets) if stop == 3 else objective(start, stop, h, pixels, targets)

    for k, block in enumerate(blocks):
        h = block(features[k])
        (independent * loss(k, k + 1, h)).backward()
        features.append(h.detach())
    for start in (0, 1):
        with buffers_kept(bare):
            h = blocks[start + 1](blocks[start](features[start]))
            (cascade * loss(start, start + 2, h)).backward()


@pytest.mark.parametrize("patches", [1, 2])
def test_over_dgl(patches: int) -> None:
    """``yhat = (1 / n**2) * sum of head(patch)`` on both levels."""

    class Head(MlpSR):
        """DGL's head; the quadrants of 8 x 8 features are pooled to one position, which pooling to 2 x 2 leaves."""

        def forward(self, x: Tensor) -> Tensor:
            if self.size > 1:
                return super().forward(x)
            x = x.mean((2, 3), keepdim=True)
            x = torch.relu(self.norm1(self.conv1(x)))
            x = torch.relu(self.norm2(self.conv2(x)))
            x = torch.relu(self.norm3(self.conv3(x))).flatten(1)
            x = torch.relu(self.norm4(self.fc1(x)))
            x = torch.relu(self.norm5(self.fc2(x)))
            x = torch.relu(self.norm6(self.fc3(x)))
            return self.out(x)

    def head_at(stop: int) -> nn.Module:
        width, size = WIDTHS[stop], SIDES[stop] // patches
        made = Head(width, size)
        if made.size == 1:
            made.fc1, made.fc2, made.fc3 = (nn.Linear(width, width) for _ in range(3))
            made.norm4, made.norm5, made.norm6 = (nn.BatchNorm1d(width) for _ in range(3))
            made.out = nn.Linear(width, CLASSES)
        return made

    network, bare = network_of(hpff(windows(dgl(TASK), local=0.3, cascade=0.7), patches=patches))
    library = [network.auxiliary[f"{start}-{stop}"] for start, stop in SPANS]
    own = {span: copied(head_at(span[1]), aux) for span, aux in zip(SPANS, library, strict=True)}

    def objective(start: int, stop: int, h: Tensor, _: Tensor, targets: Tensor) -> Tensor:
        head = own[start, stop]
        return F.cross_entropy(head(h) if patches == 1 else mean_of_four(head, h), targets)

    train_both(network, bare, list(own.values()), library, lambda _: run_levels(bare, 0.3, 0.7, objective))


@pytest.mark.parametrize("patches", [1, 2])
def test_over_infopro(patches: int) -> None:
    """Label heads everywhere; decoders on single blocks too, or only where no window ends. Heads as in the table."""
    method = infopro(TASK, image=(5.0, 0.2), label=(0.05, 0.5))
    network, bare = network_of(hpff(method, patches=patches))
    image, label = {1: 5.0, 2: 0.2}, {1: 0.05, 2: 0.5}
    decodes = {(0, 1): True, (1, 2): False, (0, 2): True}
    own: dict[tuple[int, int], list[nn.Module]] = {}
    library: list[nn.Module] = []
    for span in SPANS:
        heads = list(network.auxiliary[f"{span[0]}-{span[1]}"].heads)
        assert len(heads) == 1 + decodes[span]
        width = WIDTHS[span[1]]
        own[span] = [copied(OneConvTwoLinear(width, CLASSES), heads[0])]
        if decodes[span]:
            own[span].append(copied(ImageDecoder(width) if patches == 1 else QuadrantDecoder(width), heads[1]))
        library += heads

    def objective(start: int, stop: int, h: Tensor, pixels: Tensor, targets: Tensor) -> Tensor:
        head, *decoder = own[start, stop]
        loss = label[stop] * F.cross_entropy(head(h) if patches == 1 else mean_of_four(head, h), targets)
        for one in decoder:
            image_again = one(h) if patches == 1 else stitched(one, h)
            loss = loss + image[stop] * binary_cross_entropy(image_again, pixels)
        return loss

    heads = [head for pair in own.values() for head in pair]
    train_both(network, bare, heads, library, lambda _: run_levels(bare, 1.0, 1.0, objective))


def test_whole_features_are_windows_bit_for_bit() -> None:
    ours = trained(hpff(windows(dgl(TASK), local=0.3, cascade=0.7), patches=1))
    theirs = trained(windows(dgl(TASK), width=2, local=0.3, cascade=0.7))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    patched = trained(hpff(windows(dgl(TASK), local=0.3, cascade=0.7), patches=2))
    assert not any(torch.equal(a, b) for a, b in zip(patched, theirs, strict=True) if a.dim() == 4)


def test_refusals() -> None:
    with pytest.raises(localgrad.MethodError, match="already decides its spans"):
        hpff(localgrad.methods.pgl(dgl(TASK)))
    with pytest.raises(localgrad.MethodError, match="no auxiliary heads"):
        hpff(localgrad.Method("bare", TASK, spans=localgrad.spans.Local()))
    spans = hpff(windows(auglocal(TASK, depth=1), local=0.0)).spans(4, 0)
    assert [(s.start, s.stop) for s in spans] == [(0, 2), (1, 4)]  # the tail counts as one block
