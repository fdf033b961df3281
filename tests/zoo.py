"""Small models and every exported method, found by iterating `localgrad.methods.__all__`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.method import Method
from localgrad.task import Task

CLASSES = 4
TASK = localgrad.tasks.classification(CLASSES, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class PlainCNN(nn.Module):
    """Convolution, BatchNorm, ReLU, dropout, as often as asked; every unit is a cut point."""

    def __init__(self, dropout: float = 0.2, width: int = 8, units: int = 5) -> None:
        super().__init__()
        widths = [3, *[width] * units]
        self.units = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Dropout(dropout))
                for a, b in pairwise(widths)
            )
        )
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(x).mean((2, 3)))


class ResidualUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.drop = nn.Dropout2d(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class Residual(nn.Module):
    """A stem and four residual units of two resolutions; boundaries lie before the unit that reads twice."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.stage1 = nn.Sequential(ResidualUnit(8, 8, 1, dropout), ResidualUnit(8, 8, 1, dropout))
        self.stage2 = nn.Sequential(ResidualUnit(8, 16, 2, dropout), ResidualUnit(16, 16, 1, dropout))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind()
        attended = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + self.drop(self.proj(attended.transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Patches of 2 pixels, a class token, four layers: tokens (B, 17, 12) of 8-pixel images."""

    def __init__(self, dropout: float = 0.2, width: int = 12, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 17, width))
        self.layers = nn.Sequential(*(Layer(width, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.fc(self.norm(self.layers(x))[:, 0])


MODELS: dict[str, Callable[..., nn.Module]] = {"cnn": PlainCNN, "residual": Residual, "transformer": Transformer}


def is_base(name: str) -> bool:
    """Whether a method takes a task; a plug-in takes a method, called ``base``."""
    first = next(iter(inspect.signature(getattr(localgrad.methods, name)).parameters))
    assert first in ("task", "base"), f"the first parameter of {name} is {first!r}; bases take task, plug-ins base"
    return first == "task"


def _teacher() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return PlainCNN(units=12)


# What a method cannot do without, besides its task or base.
REQUIRED: dict[str, dict[str, object]] = {"feature_distillation": {"teacher": _teacher()}}


def bases(task: Task) -> dict[str, Method]:
    """Every base on a task, by its name."""
    return {
        name: getattr(localgrad.methods, name)(task, **REQUIRED.get(name, {}))
        for name in localgrad.methods.__all__
        if is_base(name)
    }


def composed(bases: dict[str, Method]) -> tuple[dict[str, Method], dict[tuple[str, str], str]]:
    """The bases and every plug-in on each of them; what is refused, with the reason."""
    accepted, refused = dict(bases), {}
    for name in localgrad.methods.__all__:
        if is_base(name):
            continue
        for base in bases.values():
            try:
                method = getattr(localgrad.methods, name)(base)
            except localgrad.MethodError as error:
                refused[name, base.name] = str(error)
            else:
                accepted[method.name] = method
    return accepted, refused


# Every plug-in on every base, for test_composition.py; the contract is tested on the bases and on plug-ins over DGL.
BASES = bases(TASK)
COMPOSED, REFUSED = composed(BASES)
METHODS = {name: method for name, method in COMPOSED.items() if name in BASES or name.endswith("(dgl)")}
METHODS |= {name: COMPOSED[name] for name in ("checkpointing(e2e)", "accumulation(e2e)")}


def widest(method: Method, num_blocks: int) -> int:
    """Blocks of the widest span of any step."""
    return max(s.stop - s.start for pattern in method.spans.patterns(num_blocks) for s in pattern)


def steps(network: localgrad.LocalNetwork, limit: int = 50) -> list[int]:
    """One step for each set of spans that occurs."""
    seen: dict[object, int] = {}
    for step in range(limit):
        seen.setdefault(network.spans(step), step)
    return list(seen.values())


def batch(size: int = 8, pixels: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) normalised as `TASK` says, and classes that all occur."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(size, 3, pixels, pixels, generator=generator) - 0.5) / 0.25
    return images, torch.arange(size) % CLASSES


def build(model: str, method: Method, num_blocks: int, seed: int = 0, **options: float) -> localgrad.LocalNetwork:
    """A network in training mode; equal seeds give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return localgrad.localize(MODELS[model](**options), method, num_blocks, example=batch(2)[0])
