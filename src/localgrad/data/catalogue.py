"""From the name of a data set to its loaders."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from localgrad import named, randomness
from localgrad.data import boxes, folders, masks, own
from localgrad.data.augment import Normalise, resize
from localgrad.data.dataset import Data, Found, hold_out, root_of
from localgrad.data.kept import Kept, room_for
from localgrad.data.loaders import Files, OnDamage, Order, Resident
from localgrad.data.paths import full_name
from localgrad.data.pictures import read_picture
from localgrad.data.sources import SOURCES, Layout, Source
from localgrad.errors import ConfigError, DataError, nearest

_LARGEST = 16 * 2**30  # bytes that the resized copy of a resident set may take


def available(root: str | Path | None = None) -> list[Found]:
    """Which sets lie below ``root`` (`root_of` says where if None), by the presence of their files; opens none of them.

    Example:
        >>> import localgrad.data
        >>> [name for name, title, found, where in localgrad.data.available() if name == "digits" and found]
        ['digits']
    """
    base = root_of(root)
    lines = []
    for name, source in SOURCES.items():
        found = source.search(base)
        if name == "imagefolder" and not isinstance(found, tuple):  # `localgrad.data.paths.FORMS` says what that needs
            continue
        if isinstance(found, tuple):
            lines.append(Found(name, found[0].title or source.title, True, str(found[1].resolve())))
        else:
            lines.append(Found(name, source.title, False, "not in " + "; ".join(found)))
    return [*lines, *masks.available(base), *boxes.available(base)]


def load(
    name: str,
    *,
    root: str | Path | None = None,
    batch_size: int,
    eval_batch_size: int | None = None,
    image_size: int | None = None,
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
    """The loaders of data set ``name``.

    Args:
        name: one of `available`, or ``folder:/path`` for images sorted as ``train/<class>/*``, ``val/<class>/*`` and
            ``test/<class>/*``, one of the last two being enough, or ``module:function`` of a function that returns
            `localgrad.data.Splits`.
        root: where the user's copies lie; `root_of` says where if None.
        batch_size: images in a training batch, over all replicas; a multiple of ``num_replicas``.
        eval_batch_size: images in a validation or test batch; ``batch_size`` if None.
        image_size: height and width (pixels) to resize to; None keeps the set's own (224 for folders).
        validation: fraction in [0, 1) of the training images to hold out, by a keyed permutation that is the same for
            every seed. They are evaluated without augmentation. Folders that have ``val`` beside ``test`` use that
            instead, unless this is 0.
        limit: use only the first ``limit`` training images, validation included; of a folder, which lists class after
            class, the first of a fixed keyed permutation.
        seed: keys the order and the augmentation of training batches.
        augment: whether training images are augmented; without it folders are read as for evaluation.
        workers: processes that read image files; resident sets need none. Pictures of class folders are decoded once
            and kept in memory as far as there is room (`localgrad.data.kept`), which changes no bit of a batch.
        drop_last: leave out the last, partial training batch.
        device: where batches are given; resident sets are held there.
        on_damage: ``raise`` for an image file that cannot be used, or ``skip`` it; see `localgrad.data.loaders.Files`.
        replica: which of ``num_replicas`` contiguous shares of every training batch to give. Evaluation is not shared
            out: each replica gets all of it.

    Raises:
        DataError: the set is unknown, missing or damaged.
        ConfigError: an argument makes no sense, or a split would be empty.

    Example:
        >>> import localgrad.data
        >>> data = localgrad.data.load("digits", batch_size=64)
        >>> inputs, targets = next(data.train.epoch(0))
        >>> inputs.shape, data.num_classes
        (torch.Size([64, 1, 8, 8]), 10)
    """
    name = full_name(name)
    kind, path = name, root
    if name.startswith("folder:"):
        kind, path = "imagefolder", name.removeprefix("folder:")
    its_own = kind == name and named.is_named(name)
    if kind not in SOURCES and not its_own:
        raise DataError(
            f"{nearest(name, SOURCES, 'data set')} For your own images write their folder, or module:function."
        )
    eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
    whole = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "num_replicas": num_replicas}
    for key, value in (whole | ({} if limit is None else {"limit": limit})).items():
        _check_whole(key, value, 1)
    _check_whole("workers", workers, 0)
    _check_whole("replica", replica, 0, num_replicas - 1)
    if batch_size % num_replicas:
        raise ConfigError(f"batch_size={batch_size} must be a multiple of num_replicas={num_replicas}")
    if not 0 <= validation < 1:
        raise ConfigError(f"validation={validation} must be a fraction in [0, 1); for one tenth write 0.1")
    if image_size is not None:
        _check_whole("image_size", image_size, 4, 1024)

    if its_own:
        if image_size is not None or not augment or root is not None:
            raise ConfigError(
                f"data.image_size, data.augment and data.root are up to the function {name!r} itself; leave them out"
            )
        return own.load(
            name, batch_size=batch_size, eval_batch_size=eval_batch_size, validation=validation, limit=limit, seed=seed,
            workers=workers, drop_last=drop_last, device=torch.device(device), on_damage=on_damage, replica=replica,
            num_replicas=num_replicas,
        )  # fmt: skip
    source = SOURCES[kind]
    base = root_of(path)
    layout, place = source.locate(name, base)
    size, device = image_size or source.shape[1], torch.device(device)
    train: Resident | Files
    still: Resident | Files
    test: Resident | Files
    validating: Files | None = None
    scored = "test"
    if layout.unpack is None:
        train, test = _resident(source, layout, place, size, limit, device)
        still, classes = replace(train, crop=None), source.classes
        train = train if augment else still
    else:
        folder = layout.unpack(place)
        scored = "test" if (folder / "test").is_dir() else "val"
        train, validating, test, classes = _files(source, folder, size, limit, workers, device, on_damage)
        still = _still(train, size)  # its pictures as evaluation sees them
        train = train if augment else still
    held, kept = hold_out(train.order.indices, 0.0 if validating else validation)
    kept_out: Resident | Files | None = replace(still, order=Order(held, eval_batch_size)) if len(held) else None
    if validating and validation > 0:
        kept_out = replace(validating, order=Order(validating.order.indices, eval_batch_size))
    return Data(
        name=name,
        title=layout.title or (source.title if name == kind else f"images in {place}"),
        num_classes=len(classes),
        classes=classes,
        input_shape=(source.shape[0], size, size),
        mean=source.mean,
        std=source.std,
        train=replace(train, order=Order(kept, batch_size, seed, drop_last, replica, num_replicas)),
        validation=kept_out,
        test=replace(test, order=Order(test.order.indices, eval_batch_size)),
        scored=scored,
    )


def _resident(
    source: Source, layout: Layout, place: Path, size: int, limit: int | None, device: torch.device
) -> tuple[Resident, Resident]:
    """Train and test split of a resident set, in the order of its files."""
    native, peak, crop = source.shape[1], source.peak, source.crop
    if size != native:  # the shifts keep their share of the image
        peak, crop = 255, crop and replace(crop, pad=max(1, round(crop.pad * size / native)))

    def split(name: str, limit: int | None) -> Resident:
        arrays = (np.array(array[:limit]) for array in source.read(layout, place, name))
        images, targets = map(torch.from_numpy, arrays)
        if size != native:
            if len(images) * source.shape[0] * size**2 > _LARGEST:
                raise ConfigError(
                    f"image_size={size} would make {len(images)} images take more than {_LARGEST // 2**30} GiB; "
                    f"use a smaller one (they have {native} pixels) or a limit"
                )
            images = resize(images, size, source.peak)
        images, targets = images.to(device), targets.to(device, torch.int64)
        order = Order(torch.arange(len(images)), len(images))
        return Resident(order, images, targets, Normalise(source.mean, source.std, peak), crop)

    return split("train", limit), split("test", None)


def _files(
    source: Source, folder: Path, size: int, limit: int | None, workers: int, device: torch.device, on_damage: OnDamage
) -> tuple[Files, Files | None, Files, tuple[str, ...]]:
    """Train, validation (if it has one of its own) and test split of a set of image files, and its classes' names."""
    (augment, fit), room = folders.transforms(size), room_for(workers)

    def split(found: folders.Folder, limit: int | None) -> Files:
        items = [(path, target, number) for number, (path, target) in enumerate(found.samples)]
        order = torch.randperm(len(items), generator=randomness.generator("limit"))[:limit].sort().values
        normalise, read = Normalise(source.mean, source.std), Kept(room, len(items), read_picture)
        return Files(
            Order(order, len(order)), items, read, augment, fit, folders.stacked, normalise, workers, device, on_damage,
            room=room,
        )  # fmt: skip

    train, own, test = folders.scan(folder)
    kept = None if own is None else _still(split(own, None), size)
    return split(train, limit), kept, _still(split(test, None), size), source.classes or train.classes


def _still(files: Files, size: int) -> Files:
    """The same pictures without augmentation: as they no longer change, they are kept as they leave the transform."""
    read = Kept(files.room, len(files.items), partial(folders.read_fitted, folders.fitting(size)))
    return replace(files, read=read, augment=folders.pixels, fit=folders.pixels)


def _check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        allowed = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name}={value!r} must be a whole number {allowed}")
