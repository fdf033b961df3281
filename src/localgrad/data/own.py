"""Data that a function of the user's returns, named ``module:function``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from localgrad import named, randomness
from localgrad.data.augment import Normalise
from localgrad.data.dataset import Data, hold_out
from localgrad.data.loaders import Files, OnDamage, Order
from localgrad.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Splits:
    """What a function of the user's returns: map-style datasets, which know their length and give items by index.

    An item is an image and its target: the image uint8 (C, H, W), or float32 with values of 0 to 1, of one shape in all
    items; the target a whole number, 0 for the first of ``classes``, or what the task of ``kind`` reads. Augmentation
    is the dataset's own; what it draws is keyed by seed, epoch and index. Localgrad shuffles, batches and normalises.

    Args:
        train, test: the two splits.
        validation: a third one; None to hold images of ``train`` out.
        classes: their names.
        mean, std: what images are normalised by, for each channel, in units of [0, 1].
        kind: the task: ``classification``, or ``module:function`` of the user's.

    Example:
        >>> import torch
        >>> from localgrad.data import Splits
        >>> def load():
        ...     images, targets = torch.rand(100, 3, 32, 32), torch.arange(100) % 2
        ...     items = [(image, int(target)) for image, target in zip(images, targets)]
        ...     return Splits(train=items[:80], test=items[80:], classes=("cat", "dog"))
    """

    train: Any = field(repr=False)
    test: Any = field(repr=False)
    classes: Sequence[str]
    validation: Any = field(default=None, repr=False)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    kind: str = "classification"


def read(name: str) -> Splits:
    """The splits that ``module:function`` returns, which is called without arguments.

    Raises:
        ConfigError: no such function, or one that returns something else.
    """
    found = named.function(name, "data")()
    if not isinstance(found, Splits):
        raise ConfigError(f"data {name!r} returned a {type(found).__name__}; it must return a localgrad.data.Splits")
    if isinstance(found.classes, str) or not found.classes:
        raise ConfigError(f"data {name!r}: classes={found.classes!r}; give their names, for instance ('cat', 'dog')")
    if found.kind != "classification" and not named.is_named(found.kind):
        raise ConfigError(f"data {name!r}: kind={found.kind!r}; write classification, or module:function of your own")
    for split, items in (("train", found.train), ("test", found.test), ("validation", found.validation)):
        optional = split == "validation" and items is None
        if not optional and not (hasattr(items, "__len__") and hasattr(items, "__getitem__") and len(items)):
            raise ConfigError(
                f"data {name!r}: {split} is a {type(items).__name__}; give a dataset with a length of at least 1 whose "
                "items are (image, target), by index"
            )
    return found


def load(
    name: str,
    *,
    batch_size: int,
    eval_batch_size: int,
    validation: float,
    limit: int | None,
    seed: int,
    workers: int,
    drop_last: bool,
    device: torch.device,
    on_damage: OnDamage,
    replica: int,
    num_replicas: int,
) -> Data:
    """The loaders of the splits that a function of the user's returns; see `localgrad.data.load`."""
    found = read(name)
    shape = tuple(_image(found.train[0][0]).shape)
    mean, std = (tuple(values) or (0.5,) * shape[0] for values in (found.mean, found.std))
    if not len(mean) == len(std) == shape[0]:
        raise ConfigError(f"data {name!r}: mean={mean}, std={std}; give one each for the {shape[0]} channels")
    num_classes = len(found.classes) if found.kind == "classification" else None

    def split(what: str, items: Any, order: Order) -> Files:
        give = partial(_item, items, shape, num_classes)
        places = [(f"{name} {what}[{index}]", index) for index in range(len(items))]
        return Files(
            order, places, _place, give, partial(_keyed, give), default_collate, Normalise(mean, std, 1), workers,
            device, on_damage,
        )  # fmt: skip

    chosen = torch.randperm(len(found.train), generator=randomness.generator("limit"))[:limit].sort().values
    held, kept = hold_out(chosen, 0.0 if found.validation is not None else validation)
    train = split("train", found.train, Order(kept, batch_size, seed, drop_last, replica, num_replicas))
    own: Files | None = None
    if found.validation is not None and validation > 0:
        own = split("validation", found.validation, Order(torch.arange(len(found.validation)), eval_batch_size))
    elif len(held):
        own = split("train", found.train, Order(held, eval_batch_size))
    test = split("test", found.test, Order(torch.arange(len(found.test)), eval_batch_size))
    classes = tuple(map(str, found.classes))
    return Data(name, name, len(classes), classes, shape, mean, std, train, own, test, kind=found.kind)


def _place(item: tuple[str, int]) -> tuple[str, int]:
    return item


def _item(items: Any, shape: tuple[int, ...], num_classes: int | None, place: str, index: int) -> tuple[Tensor, Any]:
    image, target = items[index]
    image = _image(image)
    if image.shape != shape:
        raise DataError(f"its image is {tuple(image.shape)}, the first of training {shape}; all need one shape")
    if num_classes is not None:
        if isinstance(target, Tensor) and target.numel() == 1 and not target.is_floating_point():
            target = target.item()
        if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < num_classes:
            raise DataError(f"its class is {target!r}; give a whole number from 0 to {num_classes - 1}")
    return image, target


def _keyed(give: Any, place: str, index: int) -> tuple[Tensor, Any]:
    """For evaluation: a dataset that draws at random draws the same for an index each time."""
    with randomness.seeded_everywhere("evaluation", index):
        return give(place, index)


def _image(image: Any) -> Tensor:
    """The image as float32 in 0 .. 1."""
    if isinstance(image, Tensor) and image.dim() == 3 and image.dtype == torch.uint8:
        return image.float() / 255
    if not isinstance(image, Tensor) or image.dim() != 3 or not image.is_floating_point():
        given = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise DataError(f"the image of an item is {given}; give a tensor (C, H, W), uint8 or float32 in 0 .. 1")
    if not (image.min() >= 0 and image.max() <= 1):
        raise DataError(
            f"the image of an item has values from {image.min():.3g} to {image.max():.3g}; give 0 to 1, not "
            "normalised: mean and std of Splits say what it is normalised by"
        )
    return image.float()
