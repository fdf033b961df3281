"""Images with boxes: COCO, Pascal VOC, and what else lies in one of their two layouts."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from localgrad import randomness
from localgrad.data import cache
from localgrad.data.dataset import Data, Found, hold_out, root_of
from localgrad.data.loaders import Batch, Files, OnDamage, Order
from localgrad.data.pictures import read_picture
from localgrad.data.readers import torchvision
from localgrad.errors import ConfigError, DataError

TOLERANCE = 1.0  # pixels by which a box may leave its image; annotations are rounded
DIVISIBLE = 32
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COCO_GET = (
    "Expected are annotations/instances_<split>.json and the images in <split> or images/<split>, for one split whose "
    "name begins with train and one whose name begins with val (or test); COCO itself comes from "
    "https://cocodataset.org."
)
_VOC_GET = "Expected are JPEGImages, Annotations and ImageSets/Main/<split>.txt for the splits train, val and test."


class Boxed(NamedTuple):
    """An image file and, for each of its boxes, (x, y) of two corners in pixels, class, whether it is a crowd, area.

    ``size`` is (height, width) as the annotations give it, None if they do not.
    """

    path: str
    boxes: Tensor
    labels: Tensor
    iscrowd: Tensor
    area: Tensor
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class BoxSet:
    """The images of a set, by split; ``validation`` is empty where it has none of its own.

    ``scored`` is what the split in ``test`` is called in the files.
    """

    title: str
    classes: tuple[str, ...]
    train: list[Boxed] = field(repr=False)
    validation: list[Boxed] = field(repr=False)
    test: list[Boxed] = field(repr=False)
    scored: str = "test"


def boxed(
    path: Path, rows: Sequence[tuple[list[float], int, bool, float | None]], size: tuple[int, int] | None = None
) -> Boxed:
    """One image from rows of (x1, y1, x2, y2), class, crowd and, where the file gives one, area."""
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = [row[3] for row in rows]
    given = torch.tensor([float("nan") if area is None else area for area in areas], dtype=torch.float32)
    return Boxed(
        str(path),
        boxes,
        torch.tensor([row[1] for row in rows], dtype=torch.int64),
        torch.tensor([row[2] for row in rows], dtype=torch.int64),
        torch.where(given.isnan(), sides.prod(1), given),
        size,
    )


def read_coco(annotations: Path, images: Path, on_damage: OnDamage = "raise") -> tuple[list[Boxed], tuple[str, ...]]:
    """Every image of a COCO file, those without a box included, and the names of its categories by ascending id.

    Raises:
        DataError: the file is damaged, an id of an image or a category stands twice, or a box is of an unknown category
            or no box; with ``skip`` such boxes are left out with a warning.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8-sig"))
        names = _by_id(annotations, "categories", content["categories"], lambda c: str(c["name"]).strip())
        files = _by_id(annotations, "images", content["images"], lambda i: images / str(i["file_name"]))
        sizes = {
            int(i["id"]): (int(i["height"]), int(i["width"])) for i in content["images"] if {"height", "width"} <= {*i}
        }
        label = {identifier: k for k, identifier in enumerate(sorted(names))}
        rows: dict[int, list[tuple[list[float], int, bool, float | None]]] = {identifier: [] for identifier in files}
        unknown = []
        for a in content["annotations"]:
            x, y, width, height = map(float, a["bbox"])
            category, image = int(a["category_id"]), int(a["image_id"])
            area = None if a.get("area") is None else float(a["area"])
            numbers = math.isfinite(x + y + width + height) and (area is None or 0 <= area < math.inf)
            if category not in label or image not in rows or not numbers:
                unknown.append(a)
                continue
            crowd = bool(int(a.get("iscrowd") or 0))
            rows[image].append(([x, y, x + width, y + height], label[category], crowd, area))
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"cannot read {annotations}: {type(error).__name__}: {error}. It should hold images, categories and "
            "annotations in COCO's layout."
        ) from error
    if unknown:
        first = unknown[0]
        what = (
            f"{annotations}: {len(unknown)} boxes are of a category or image that the file does not list, or no "
            f"numbers; annotation {first.get('id')} has category_id {first['category_id']}, image_id "
            f"{first['image_id']}, bbox {first['bbox']} and area {first.get('area')}"
        )
        if on_damage == "raise":
            raise DataError(f"{what}. Correct the file, or set data.on_damage=skip to leave them out.")
        warnings.warn(f"{what}; left out", stacklevel=2)
    return [boxed(files[k], rows[k], sizes.get(k)) for k in sorted(files)], tuple(names[k] for k in sorted(names))


def _by_id(annotations: Path, what: str, entries: list[Any], value: Callable[[Any], Any]) -> dict[int, Any]:
    """``value`` of each entry by its id, which may be a number or its digits."""
    found: dict[int, Any] = {}
    for entry in entries:
        if (identifier := int(entry["id"])) in found:
            raise DataError(
                f"{annotations}: two {what} have the id {identifier}, {found[identifier]} and {value(entry)}; boxes "
                "would move from one to the other. Give each its own id, also in its annotations."
            )
        found[identifier] = value(entry)
    return found


def read_voc(root: Path, split: str, classes: tuple[str, ...]) -> list[Boxed]:
    """The images that ``ImageSets/Main/<split>.txt`` names. Boxes that are ``difficult`` count as crowds do.

    Pixels are counted from 1 in the files and ``xmax`` is the last one inside, so ``x1 = xmin - 1`` and ``x2 = xmax``.

    Raises:
        DataError: a file is missing or damaged, or names an unknown class.
    """
    found = []
    for name, objects in _voc_objects(root, split):
        rows: list[tuple[list[float], int, bool, float | None]] = []
        for kind, corners, difficult in objects:
            if kind not in classes:
                raise DataError(f"{root / 'Annotations' / name}.xml names {kind!r}, which is none of {classes}.")
            rows.append((corners, classes.index(kind), difficult, None))
        found.append(boxed(root / "JPEGImages" / f"{name}.jpg", rows))
    return found


def _voc_objects(root: Path, split: str) -> Iterator[tuple[str, list[tuple[str, list[float], bool]]]]:
    from xml.etree import ElementTree

    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    try:
        names = [line.split()[0] for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {listed}: {error}. {_VOC_GET}") from error
    for name in names:
        path = root / "Annotations" / f"{name}.xml"
        try:
            objects = ElementTree.parse(path).getroot().iter("object")
            yield (
                name,
                [
                    (
                        str(one.findtext("name")).strip(),
                        [
                            float(str(one.findtext(f"bndbox/{side}"))) - offset
                            for side, offset in (("xmin", 1), ("ymin", 1), ("xmax", 0), ("ymax", 0))
                        ],
                        one.findtext("difficult") == "1",
                    )
                    for one in objects
                ],
            )
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise DataError(f"cannot read {path}: {error}. Correct or remove it.") from error


def _coco(root: Path, on_damage: OnDamage, title: str | None = None) -> BoxSet:
    files = sorted((root / "annotations").glob("instances_*.json"))
    splits = {path.stem.removeprefix("instances_"): path for path in files}
    chosen = {kind: next((s for s in splits if s.startswith(kind)), None) for kind in ("train", "val", "test")}
    if chosen["train"] is None or (chosen["val"] or chosen["test"]) is None:
        raise DataError(f"no COCO data in {root.resolve()}: found {', '.join(splits) or 'nothing'}. {_COCO_GET}")
    read: dict[str, list[Boxed]] = {}
    classes: tuple[str, ...] = ()
    for kind, split in chosen.items():
        if split is not None:
            place = next((p for p in (root / "images" / split, root / split) if p.is_dir()), root)
            read[kind], found = read_coco(splits[split], place, on_damage)
            if classes and found != classes:
                raise DataError(f"{splits[split]} lists other categories than the training split; both need the same.")
            classes = found
    tests = read.pop("test", None)
    kept = read.pop("val", [])
    return BoxSet(
        title or f"COCO layout in {root}", classes, read["train"], kept if tests else [], tests or kept,
        "test" if tests else "val",
    )  # fmt: skip


def _coco128(root: Path, on_damage: OnDamage) -> BoxSet:
    places = [p for p in (root, root / "coco128x2") if (p / "coco128_train2017.tar").is_file()]
    if not places:
        raise DataError(f"data set 'coco128' not found: neither {root.resolve()} nor its coco128x2 holds the two tars.")
    tars = [places[0] / f"coco128_{split}2017.tar" for split in ("train", "val")]
    folder = cache.unpacked(f"coco128-{cache.sha256(*tars)[:16]}", tars)
    return _coco(folder, on_damage, "COCO-128 (128 images of train2017, 128 of val2017)")


def _voc(root: Path, on_damage: OnDamage, title: str | None = None) -> BoxSet:
    splits = ("train", "val", "test")
    there = [split for split in splits if (root / "ImageSets" / "Main" / f"{split}.txt").is_file()]
    if "train" not in there or len(there) < 2:
        raise DataError(f"no VOC data in {root.resolve()}: its splits are {', '.join(there) or 'none'}. {_VOC_GET}")
    objects = (one for split in there for _, found in _voc_objects(root, split) for one in found)
    classes = tuple(sorted({kind for kind, _, _ in objects}))
    read = {split: read_voc(root, split, classes) for split in there}
    test = read.get("test") or read["val"]
    return BoxSet(
        title or f"VOC layout in {root}", classes, read["train"], read.get("val", []) if "test" in read else [], test,
        "test" if read.get("test") else "val",
    )  # fmt: skip


def _bccd(root: Path, on_damage: OnDamage) -> BoxSet:
    tar = next((p for p in (root / "bccd_voc.tar", root / "bccd" / "bccd_voc.tar") if p.is_file()), None)
    if tar is None:
        raise DataError(f"data set 'bccd' not found: neither {root.resolve()} nor its bccd holds bccd_voc.tar.")
    return _voc(cache.unpacked(f"bccd-{cache.sha256(tar)[:16]}", [tar]) / "BCCD", on_damage, "BCCD, blood cells")


SETS: dict[str, tuple[str, str, Callable[[Path, OnDamage], BoxSet]]] = {
    "coco": ("COCO 2017", "annotations/instances_train2017.json", _coco),
    "coco128": ("COCO-128", "coco128_train2017.tar", _coco128),
    "bccd": ("BCCD, blood cells", "bccd_voc.tar", _bccd),
}
LAYOUTS = {"coco": _coco, "voc": _voc}


def knows(name: str) -> bool:
    """Whether `load` reads data of this name: one of ``SETS``, ``coco:/path`` or ``voc:/path``."""
    return name in SETS or (":" in name and name.partition(":")[0] in LAYOUTS)


def available(root: str | Path | None = None) -> Iterator[Found]:
    """As `localgrad.data.available`, for these sets; looks for their files and opens nothing."""
    base = root_of(root)
    for name, (title, mark, _) in SETS.items():
        places = [p for p in (base, base / name, base / f"{name}x2") if (p / mark).exists()]
        yield Found(name, title, bool(places), str(places[0].resolve()) if places else f"not in {base.resolve()}")


def without_degenerate(images: list[Boxed]) -> list[Boxed]:
    """The images without the boxes whose width or height is not positive, which are counted in one warning."""
    kept, dropped = [], []
    for one in images:
        good = (one.boxes[:, 2:] > one.boxes[:, :2]).all(1)
        dropped += [one.path] * int((~good).sum())
        kept.append(Boxed(one.path, one.boxes[good], one.labels[good], one.iscrowd[good], one.area[good], one.size))
    if dropped:
        total = sum(len(one.boxes) for one in images)
        warnings.warn(
            f"{len(dropped)} of {total} boxes have no area and were left out, the first in {dropped[0]}", stacklevel=3
        )
    return kept


def resized(resize: Any, change: Callable[..., Any], image: Tensor, target: dict[str, Tensor]) -> tuple[Any, Any]:
    """An image and its target after ``change``, normalised and resized, with both sizes of the image."""
    original = image.shape[-2:]
    image, target = change(image, target)
    pixels = resize.normalize(image.as_subclass(Tensor) / 255)
    plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
    pixels, plain = resize.resize(pixels, plain)
    sizes = {"size": torch.tensor(pixels.shape[-2:]), "original_size": torch.tensor(original)}
    return pixels, {**plain, **sizes}


def padded(resize: Any, samples: list[tuple[Tensor, dict[str, Tensor]]]) -> Batch:
    """Images as one batch, padded, and the targets as `localgrad.tasks.detection` says."""
    return resize.batch_images([image for image, _ in samples], DIVISIBLE), [target for _, target in samples]


def read_boxed(one: Boxed) -> tuple[Tensor, dict[str, Tensor]]:
    """The image uint8 (3, H, W) and its target, as ``tv_tensors``; boxes end at its borders.

    Raises:
        DataError: the file cannot be read, is of another size than its annotations say, or a box leaves the image by
            more than a pixel.
    """
    from torchvision import tv_tensors
    from torchvision.transforms.v2.functional import pil_to_tensor

    image = pil_to_tensor(read_picture(one.path))
    height, width = image.shape[1:]
    if one.size is not None and one.size != (height, width):
        raise DataError(
            f"{one.path} is {width}x{height} pixels as it is shown, its annotations are for "
            f"{one.size[1]}x{one.size[0]}; replace one of them, or set data.on_damage=skip."
        )
    limits = torch.tensor([width, height, width, height])
    outside = ((one.boxes < -TOLERANCE) | (one.boxes > limits + TOLERANCE)).any(1)
    if outside.any():
        raise DataError(
            f"box {one.boxes[outside][0].tolist()} leaves its image {one.path}, {width}x{height} pixels; correct it, "
            "or set data.on_damage=skip."
        )
    boxes = tv_tensors.BoundingBoxes(one.boxes.clamp(min=0).minimum(limits), format="XYXY", canvas_size=(height, width))
    return tv_tensors.Image(image), {
        "boxes": boxes,
        "labels": one.labels,
        "iscrowd": one.iscrowd,
        "area": one.area,
    }


def resizing(image_size: int | tuple[int, int] | None, longest_side: int | None) -> Any:
    """torchvision's ``GeneralizedRCNNTransform``; see `load` for the arguments.

    Raises:
        ConfigError: sizes that are too small, or contradict each other.
    """
    sides = (image_size,) if isinstance(image_size, int) else tuple(image_size or (800,))
    if len(sides) > 2 or not all(isinstance(side, int) and side >= DIVISIBLE for side in sides):
        raise ConfigError(f"data.image_size={image_size}; write a shorter side or [height, width], at least 32 pixels")
    longest = longest_side or round(sides[0] * 1333 / 800)
    if len(sides) == 1 and longest < sides[0]:
        raise ConfigError(f"data.longest_side={longest} is less than the shorter side, data.image_size={sides[0]}")
    fixed = sides[::-1] if len(sides) == 2 else None
    transform = torchvision("models.detection.transform").GeneralizedRCNNTransform
    return transform(sides[0], longest, list(_MEAN), list(_STD), DIVISIBLE, fixed).eval()


def load(
    name: str,
    *,
    root: str | Path | None = None,
    batch_size: int,
    eval_batch_size: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    longest_side: int | None = None,
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
    """The loaders of a set of images and boxes; see `localgrad.data.load` for what is not said here.

    Args:
        name: ``coco128``, ``bccd``, ``coco``, or ``coco:/path`` and ``voc:/path`` for data in these layouts.
        image_size: the shorter side (pixels) that images are resized to, keeping their shape, or (height, width) that
            all of them get; None for 800. Batches are padded to multiples of 32.
        longest_side: limit of the other side; None for 1333 / 800 of the shorter.
        validation: share of the training images to hold out; a set with a validation split of its own uses that
            instead, unless this is 0.
        limit: the first so many training images of a fixed keyed permutation.
        augment: whether half of the training images are mirrored.
        on_damage: ``raise`` for what cannot be used, or ``skip`` it; see `localgrad.data.loaders.Files`.

    Raises:
        DataError: the set is missing or damaged.
        ConfigError: an argument makes no sense.
    """
    kind, _, path = name.partition(":")
    if path:
        found = LAYOUTS[kind](root_of(path), on_damage)
    else:
        found = SETS[name][2](root_of(root), on_damage)
    if not any(len(one.boxes) for one in found.train):
        raise DataError(
            f"{found.title}: no training image has a box, so there is nothing to learn; check the annotations."
        )
    resize = resizing(image_size, longest_side)
    if not 0 <= validation < 1:
        raise ConfigError(f"validation={validation} must be a fraction in [0, 1); for one tenth write 0.1")
    mirror = torchvision("transforms.v2").RandomHorizontalFlip(0.5 if augment else 0.0)
    training = torch.randperm(len(found.train), generator=randomness.generator("limit"))[:limit].sort().values
    held = torch.empty(0, dtype=torch.int64)
    if validation > 0 and not found.validation:
        held, training = hold_out(training, validation)

    def split(images: list[Boxed], indices: Tensor) -> Files:
        order = Order(indices, eval_batch_size or batch_size)
        augment, fit = partial(resized, resize, mirror), partial(resized, resize, lambda *sample: sample)
        stack = partial(padded, resize)
        return Files(
            order, without_degenerate(images), read_boxed, augment, fit, stack, lambda inputs: inputs, workers,
            torch.device(device), on_damage,
        )  # fmt: skip

    train, test = split(found.train, training), split(found.test, torch.arange(len(found.test)))
    train = replace(train, order=Order(training, batch_size, seed, drop_last, replica, num_replicas))
    kept = None
    if validation > 0 and found.validation:
        kept = split(found.validation, torch.arange(len(found.validation)))
    elif validation > 0:
        kept = replace(train, order=Order(held, eval_batch_size or batch_size))
    shorter = resize.min_size[0]
    width, height = resize.fixed_size or (min(resize.max_size, shorter * 4 // 3), shorter)
    shape = (3, -(-height // DIVISIBLE) * DIVISIBLE, -(-width // DIVISIBLE) * DIVISIBLE)
    return Data(
        name, found.title, len(found.classes), found.classes, shape, _MEAN, _STD, train, kept, test, kind="detection",
        scored=found.scored,
    )  # fmt: skip
