"""Each paper's training step again, slow and literal: own heads, own losses in loops, own walk through the network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad

CLASSES = 5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TASK = localgrad.tasks.classification(CLASSES, mean=MEAN, std=STD)
CHANNELS = (16, 32)  # at the two inner boundaries of the three stages
Objective = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def segments(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """The three stages of a CIFAR ResNet, the stem with the first, the classifier with the last."""
    return [
        lambda x: model.layer1(torch.relu(model.bn1(model.conv1(x)))),
        lambda x: model.layer2(x),
        lambda x: model.fc(model.layer3(x).mean((2, 3))),
    ]


def data(size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels in [0, 1], the normalised images, classes of which one occurs once."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64)[None, :, None, None] for v in (MEAN, STD))
    return pixels, (pixels - mean) / std, torch.tensor([0, 1, 2, 0, 1, 3, 0, 2][:size])


def setup(method: localgrad.Method) -> tuple[localgrad.LocalNetwork, nn.Module]:
    """The library's network and a bare copy of its model."""
    torch.manual_seed(0)
    model = localgrad.models.resnet8(CLASSES).double()
    network = localgrad.localize(model, method, ("layer2", "layer3"), example=data(2)[1])
    for parameter in network.auxiliary.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network, copy.deepcopy(model)


def copied(own: nn.Module, library: nn.Module) -> nn.Module:
    """Our own head with the library's weights, by the order of their parameters."""
    own.double()
    ours, theirs = list(own.parameters()), list(library.parameters())
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
    return own


def compare(
    network: localgrad.LocalNetwork,
    bare: nn.Module,
    own: list[nn.Module],
    library: list[nn.Module],
    step: Callable[[], None],
) -> None:
    """Three training steps of both, SGD with momentum; gradients agree to 1e-12 at each."""
    ours = [*bare.parameters(), *(p for head in own for p in head.parameters())]
    theirs = [*network.model.parameters(), *(p for head in library for p in head.parameters())]
    assert {id(p) for p in theirs} == {id(p) for p in network.parameters()}
    optimizers = [torch.optim.SGD(p, 0.02, momentum=0.9) for p in (ours, theirs)]
    _, images, targets = data()
    for index in range(3):
        step()
        for _, loss in localgrad.local_losses(network, images, targets, index):
            loss.backward()
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.grad is not None and other.grad is not None
            assert mine.grad.any()
            assert (mine.grad - other.grad).abs().max().item() <= 1e-12 * max(1.0, mine.grad.abs().max().item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def walk(bare: nn.Module, objective: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Simultaneous local training: forward a stage, its loss, its backward pass, detach, go on."""
    pixels, x, targets = data()
    for index, segment in enumerate(segments(bare)):
        x = segment(x)
        loss = F.cross_entropy(x, targets) if index == 2 else objective(index, x, pixels, targets)
        loss.backward()
        x = x.detach()


# --- decoupled greedy learning -----------------------------------------------------------------------------------


class MlpSR(nn.Module):
    """DGL's head, layer by layer (released ``mlp-sr``)."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = math.ceil(size / 4)
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv3, self.norm3 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.fc1, self.norm4 = nn.Linear(4 * channels, 4 * channels), nn.BatchNorm1d(4 * channels)
        self.fc2, self.norm5 = nn.Linear(4 * channels, 4 * channels), nn.BatchNorm1d(4 * channels)
        self.fc3, self.norm6 = nn.Linear(4 * channels, 4 * channels), nn.BatchNorm1d(4 * channels)
        self.out = nn.Linear(4 * channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, self.size)
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        x = torch.relu(self.norm3(self.conv3(x)))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        x = torch.relu(self.norm4(self.fc1(x)))
        x = torch.relu(self.norm5(self.fc2(x)))
        x = torch.relu(self.norm6(self.fc3(x)))
        return self.out(x)


def test_dgl() -> None:
    network, bare = setup(localgrad.methods.dgl(TASK))
    library = [network.auxiliary["0-1"], network.auxiliary["1-2"]]
    own = [copied(MlpSR(c, s), aux) for c, s, aux in zip(CHANNELS, (16, 8), library, strict=True)]
    compare(network, bare, own, library, lambda: walk(bare, lambda k, h, _, y: F.cross_entropy(own[k](h), y)))


# --- InfoPro -----------------------------------------------------------------------------------------------------


class OneConvTwoLinear(nn.Module):
    """``1c2f`` for 16 and 32 channels (core.md 1.3)."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * channels)
        self.fc1, self.fc2 = nn.Linear(2 * channels, 128), nn.Linear(128, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


class ImageDecoder(nn.Module):
    """Bilinear to the image size, conv3x3 to 12, BN, ReLU, conv3x3 to 3, sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(channels, 12, 3, 1, 1), nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=True)
        return torch.sigmoid(self.conv2(torch.relu(self.norm(self.conv1(x)))))


def binary_cross_entropy(p: Tensor, x: Tensor) -> Tensor:
    return -(x * torch.log(p) + (1 - x) * torch.log(1 - p)).mean()


def supervised_contrastive(embedding: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Khosla et al. eq. 2 with one view, pair by pair."""
    size = len(labels)
    z = [row / row.norm() for row in embedding]
    total = embedding.new_zeros(())
    for i in range(size):
        denominator = embedding.new_zeros(())
        for a in range(size):
            if a != i:
                denominator = denominator + torch.exp((z[i] * z[a]).sum() / temperature)
        positives = [p for p in range(size) if p != i and labels[p] == labels[i]]
        inner = embedding.new_zeros(())
        for p in positives:
            inner = inner + torch.log(torch.exp((z[i] * z[p]).sum() / temperature) / denominator)
        total = total - inner / max(1, len(positives))
    return total / size


@pytest.mark.parametrize("loss, released", [("softmax", False), ("contrast", False), ("softmax", True)])
def test_infopro(loss: str, released: bool) -> None:
    method = localgrad.methods.infopro(TASK, image=(5.0, 0.2), label=(0.05, 0.5), loss=loss, released=released)
    network, bare = setup(method)
    library = [head for key in ("0-1", "1-2") for head in network.auxiliary[key].heads]
    outputs = CLASSES if loss == "softmax" else 128
    own = []
    for channels, pair in zip(CHANNELS, (library[:2], library[2:]), strict=True):
        own += [copied(OneConvTwoLinear(channels, outputs), pair[0]), copied(ImageDecoder(channels), pair[1])]
    image, label = (5.0, 0.2), (0.05, 0.5)  # at K = 3 each boundary is an end of the ramps

    def objective(k: int, h: Tensor, pixels: Tensor, targets: Tensor) -> Tensor:
        head, decoder = own[2 * k], own[2 * k + 1]
        if loss == "softmax":
            about_label = F.cross_entropy(head(h), targets)
        else:
            about_label = supervised_contrastive(head(h), targets)
        return image[k] * binary_cross_entropy(decoder(h), pixels) + label[k] * about_label

    compare(network, bare, own, library, lambda: walk(bare, objective))


# --- PredSim -----------------------------------------------------------------------------------------------------


class PoolAndRead(nn.Module):
    """Average-pool to 256 values, halving the height, then the width, and so on; each output by itself, then linear."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.kernel = [1, 1]
        while channels * size * size > 256 * self.kernel[0] * self.kernel[1]:
            self.kernel[self.kernel[0] > self.kernel[1]] *= 2
        self.fc = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.kernel
        cells = []
        for i in range(x.shape[2] // height):
            for j in range(x.shape[3] // width):
                rows, columns = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                cells.append(x[:, :, rows, columns].mean((2, 3)))
        return self.fc(torch.stack(cells, 2).flatten(1))


def similarity(rows: Tensor) -> list[list[Tensor]]:
    """Cosines of centred rows, pair by pair."""
    centred = [row - row.mean() for row in rows]
    unit = [row / (1e-8 + torch.sqrt((row * row).sum())) for row in centred]
    return [[(a * b).sum().clamp(-1, 1) for b in unit] for a in unit]


def similarity_matching(maps: Tensor, targets: Tensor) -> Tensor:
    spread = torch.stack([torch.stack([channel.std() for channel in sample]) for sample in maps])
    found, wanted = similarity(spread), similarity(F.one_hot(targets, CLASSES).double())
    size = len(targets)
    return sum((found[i][j] - wanted[i][j]) ** 2 for i in range(size) for j in range(size)) / size**2


@pytest.mark.parametrize("released", [False, True])
def test_predsim(released: bool) -> None:
    network, bare = setup(localgrad.methods.predsim(TASK, beta=0.9, size=256, released=released))
    library = [head for key in ("0-1", "1-2") for head in network.auxiliary[key].heads]
    own = []
    for channels, size, pair in zip(CHANNELS, (16, 8), (library[:2], library[2:]), strict=True):
        own += [copied(PoolAndRead(channels, size), pair[0])]
        own += [copied(nn.Conv2d(channels, channels, 3, padding=1, bias=False), pair[1])]

    def objective(k: int, h: Tensor, _: Tensor, targets: Tensor) -> Tensor:
        predicted = F.cross_entropy(own[2 * k](h), targets)
        return 0.1 * predicted + 0.9 * similarity_matching(own[2 * k + 1](h), targets)

    compare(network, bare, own, library, lambda: walk(bare, objective))


# --- deep supervision --------------------------------------------------------------------------------------------


def test_deep_supervision() -> None:
    network, bare = setup(localgrad.methods.deep_supervision(TASK, weight=0.4))
    library = [network.auxiliary["0-1"], network.auxiliary["0-2"]]
    own = [copied(nn.Linear(c, CLASSES), aux) for c, aux in zip(CHANNELS, library, strict=True)]

    def step() -> None:
        _, x, targets = data()
        first, second, last = segments(bare)
        a = first(x)
        b = second(a)
        loss = F.cross_entropy(last(b), targets)
        loss = loss + 0.4 * F.cross_entropy(own[0](a.mean((2, 3))), targets)
        loss = loss + 0.4 * F.cross_entropy(own[1](b.mean((2, 3))), targets)
        loss.backward()

    compare(network, bare, own, library, step)


def test_windows_of_dgl() -> None:
    """Two-block windows as the papers run them: forward the two blocks again from detached features."""
    network, bare = setup(localgrad.methods.windows(localgrad.methods.dgl(TASK), width=2, local=0.3, cascade=0.7))
    library = [network.auxiliary[key] for key in ("0-1", "0-2", "1-2")]
    own = [copied(MlpSR(c, s), aux) for (c, s), aux in zip([(16, 16), (32, 8), (32, 8)], library, strict=True)]

    def step() -> None:
        _, x, targets = data()
        first, second, last = segments(bare)
        a = first(x)
        (0.3 * F.cross_entropy(own[0](a), targets)).backward()
        b = second(first(x))
        (0.7 * F.cross_entropy(own[1](b), targets)).backward()
        b = second(a.detach())
        (0.3 * F.cross_entropy(own[2](b), targets)).backward()
        c = last(second(a.detach()))
        (0.7 * F.cross_entropy(c, targets)).backward()
        c = last(b.detach())
        (0.3 * F.cross_entropy(c, targets)).backward()

    compare(network, bare, own, library, step)
