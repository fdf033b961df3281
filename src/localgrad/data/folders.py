"""Image files sorted as ``<split>/<class>/*``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localgrad.data.pictures import SUFFIXES, read_picture, unusable
from localgrad.data.readers import torchvision
from localgrad.errors import DataError


@dataclass(frozen=True)
class Folder:
    """The image files of one split: (path, class index) pairs, sorted by class and name, and the class names."""

    samples: list[tuple[str, int]]
    classes: tuple[str, ...]


def scan(root: Path) -> tuple[Folder, Folder | None, Folder]:
    """The splits ``root/train``, ``root/val`` and ``root/test``; without ``test``, networks are scored on ``val``.

    Hidden files and folders are passed over. Links are followed, and each real folder is read once. Files that are no
    pictures by their ending are counted in one warning.

    Raises:
        DataError: a split is missing, a class folder holds no image, or the splits differ in their classes.
    """
    there = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    if len(there) < 2 or there[0] != "train":
        raise DataError(
            f"{root.resolve()} has the folders {', '.join(there) or 'neither train nor val nor test'}; it needs "
            "train/<class>/* to train on, and val/<class>/* or test/<class>/* to evaluate."
        )
    left_out: list[Path] = []
    found = {name: _split(root / name, left_out) for name in there}
    for name in there[1:]:
        if found[name].classes != found["train"].classes:
            odd = sorted(set(found["train"].classes) ^ set(found[name].classes))
            raise DataError(
                f"{root / 'train'} and {root / name} differ in their class folders: {', '.join(odd[:5])}"
                f"{' and more' if len(odd) > 5 else ''} in one only; both need the same."
            )
    if left_out:
        endings = sorted({path.suffix or "no ending" for path in left_out})
        warnings.warn(
            f"{len(left_out)} files below {root} are no pictures by their ending ({', '.join(endings[:5])}) and were "
            f"left out, the first {left_out[0]}; pictures end in {', '.join(SUFFIXES)}",
            stacklevel=3,
        )
    return found["train"], found.get("val") if "test" in found else None, found.get("test") or found["val"]


def _split(place: Path, left_out: list[Path]) -> Folder:
    names = sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{place.resolve()} should hold <class>/<image> files, but it has no class folders.")
    seen: dict[Path, Path] = {}
    samples = []
    for label, name in enumerate(names):
        files = _pictures(place / name, seen, left_out)
        if not files:
            raise DataError(f"{place.resolve()} should hold <class>/<image> files, but {name!r} holds no picture.")
        samples += [(str(path), label) for path in files]
    return Folder(samples, tuple(names))


def _pictures(folder: Path, seen: dict[Path, Path], left_out: list[Path]) -> list[Path]:
    """The pictures of a folder and of those in it, sorted by name; ``seen`` are the real folders that were read."""
    if (first := seen.setdefault(folder.resolve(), folder)) != folder:
        raise DataError(f"{folder} and {first} are one folder by way of a link; remove one of them.")
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += _pictures(entry, seen, left_out)
        elif entry.suffix.lower() in SUFFIXES:
            found.append(entry)
        else:
            left_out.append(entry)
    return found


def transforms(size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """For training and for evaluation: PIL image -> uint8 (3, size, size), with its class.

    Training takes a random resized crop and mirrors half of the images; evaluation does what `fitting` does.

    Source: the ImageNet recipe of He et al., Deep Residual Learning, CVPR 2016, as in torchvision's references.
    Differs: nothing known.
    """
    v2 = torchvision("transforms.v2")
    train = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.ToImage()])
    return partial(_both, train), partial(_both, v2.Compose([fitting(size), v2.ToImage()]))


def fitting(size: int) -> Callable[[Any], Any]:
    """PIL image -> PIL image: resizes the shorter edge to size * 256 / 224 and crops the centre."""
    v2 = torchvision("transforms.v2")
    return v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])


def read_fitted(fit: Callable[[Any], Any], path: str) -> Any:
    """The picture at a path, as ``fit`` makes it; `DataError` where either fails."""
    picture = read_picture(path)
    try:
        return fit(picture)
    except Exception as error:  # a picture of one pixel may fail in any transform
        raise unusable(path, " ".join(str(error).split())) from error


def pixels(image: Any, target: int) -> tuple[Tensor, int]:
    """A PIL image as uint8 (3, H, W), with its class."""
    return torchvision("transforms.v2.functional").to_image(image), target


def stacked(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Images uint8 (B, C, H, W) and classes int64 (B,)."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images).as_subclass(Tensor), torch.tensor(targets)


def _both(change: Callable[[Any], Tensor], image: Any, target: int) -> tuple[Tensor, int]:
    """A transform of the image alone."""
    return change(image), target
