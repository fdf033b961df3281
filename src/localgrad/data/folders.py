"""Image files sorted as ``<split>/<class>/*``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localgrad.data.readers import torchvision
from localgrad.errors import DataError


@dataclass(frozen=True)
class Folder:
    """The image files of one split: (path, class index) pairs, sorted by class and name, and the class names."""

    samples: list[tuple[str, int]]
    classes: tuple[str, ...]
    read: Callable[[str], Any]


def scan(root: Path) -> tuple[Folder, Folder]:
    """The training split ``root/train`` and the test split: ``root/test`` if there is one, else ``root/val``.

    Raises:
        DataError: a split is missing, a class folder holds no image, or the splits differ in their classes.
    """
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not tests:
        raise DataError(f"{root.resolve()} has a train folder but neither val nor test; add val/<class>/* to evaluate.")
    train, test = _split(root / "train"), _split(tests[0])
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"{root / 'train'} and {tests[0]} differ in their class folders: {', '.join(odd[:5])}"
            f"{' and more' if len(odd) > 5 else ''} in one only; both need the same."
        )
    return train, test


def _split(place: Path) -> Folder:
    try:
        found = torchvision("datasets").ImageFolder(str(place))
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{place.resolve()} should hold <class>/<image> files, but: {reason}") from error
    return Folder(found.samples, tuple(found.classes), found.loader)


def transforms(size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """For training and for evaluation: PIL image -> uint8 (3, size, size), with its class.

    Training takes a random resized crop and mirrors half of the images; evaluation resizes the shorter edge to
    size * 256 / 224 and crops the centre.

    Source: the ImageNet recipe of He et al., Deep Residual Learning, CVPR 2016, as in torchvision's references.
    Differs: nothing known.
    """
    v2 = torchvision("transforms.v2")
    train = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.ToImage()])
    evaluate = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size), v2.ToImage()])
    return partial(_both, train), partial(_both, evaluate)


def read(sample: tuple[str, int], decode: Callable[[str], Any]) -> tuple[Any, int]:
    """The image at a path, as PIL decodes it, and its class.

    Raises:
        DataError: it cannot be decoded.
    """
    path, target = sample
    try:
        return decode(path), target
    except Exception as error:  # the decoders of damaged files raise nearly anything
        raise DataError(f"cannot decode image {path}: {error}. Replace or remove this file.") from error


def stacked(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Images uint8 (B, C, H, W) and classes int64 (B,)."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images).as_subclass(Tensor), torch.tensor(targets)


def _both(change: Callable[[Any], Tensor], image: Any, target: int) -> tuple[Tensor, int]:
    """A transform of the image alone."""
    return change(image), target
