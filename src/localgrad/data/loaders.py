"""Batches as a pure function of (seed, epoch, batch), whatever was drawn before and however many workers help."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from localgrad import randomness
from localgrad.data.augment import Crop, Normalise
from localgrad.errors import ConfigError, DataError

Batch = tuple[Tensor, Any]
OnDamage = Literal["raise", "skip"]


@runtime_checkable
class Loader(Protocol):
    """The batches of one split."""

    @property
    def num_images(self) -> int:
        """Images in the split, over all replicas."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start + 1``, ... of ``epoch`` (both counted from 0).

        Each is ``inputs`` float32 (B, C, H, W), normalised, and ``targets`` as the task reads them, int64 (B,) for
        classification. Equal arguments give bit for bit equal batches; torch's global generators are left as they were.
        """


@dataclass(frozen=True, eq=False)
class Order:
    """Which images make up which batch, for one replica.

    ``indices`` (N,) int64 are the images of the split. An order with a ``seed`` is one for training: each epoch has its
    own keyed permutation, and loaders augment. One without keeps to the order given, and loaders do not augment.
    Replica r of R takes the r-th of R contiguous shares of every batch of ``batch_size``.

    Raises:
        ConfigError: an epoch would have no batch, or a batch would leave a replica without an image.
    """

    indices: Tensor = field(repr=False)
    batch_size: int
    seed: int | None = None
    drop_last: bool = False
    replica: int = 0
    num_replicas: int = 1

    def __post_init__(self) -> None:
        count = len(self.indices)
        if len(self) == 0:
            raise ConfigError(
                f"drop_last=True with batch_size={self.batch_size} leaves no batch of {count} images; "
                f"use batch_size of at most {count} or drop_last=False"
            )
        rest = 0 if self.drop_last else count % self.batch_size
        if 0 < rest < self.num_replicas:
            raise ConfigError(
                f"the last batch has {rest} of {count} images, too few for {self.num_replicas} replicas; "
                "pass drop_last=True or another batch_size"
            )

    def __len__(self) -> int:
        whole, rest = divmod(len(self.indices), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def batches(self, epoch: int, start: int = 0) -> list[Tensor]:
        """The image indices of batches ``start`` .. of ``epoch``, this replica's share: tensors (B,) int64."""
        if not 0 <= start <= len(self):
            raise ConfigError(f"start={start}, but an epoch has {len(self)} batches; use 0 to {len(self)}")
        order = self.indices
        if self.seed is not None:
            order = order[torch.randperm(len(order), generator=randomness.generator(self.seed, "order", epoch))]
        return [self._share(batch) for batch in order.split(self.batch_size)[start : len(self)]]

    def _share(self, batch: Tensor) -> Tensor:
        return batch[
            len(batch) * self.replica // self.num_replicas : len(batch) * (self.replica + 1) // self.num_replicas
        ]


@dataclass(frozen=True, eq=False)
class Resident:
    """A split held as one uint8 tensor on the device that trains, augmented and normalised there.

    What ``crop`` does to an image depends on (seed, epoch, its index) alone: the shifts and flips of all images are
    drawn once an epoch, then indexed. ``images`` is (N, C, H, W) uint8, ``targets`` (N,) int64; splits share them.
    """

    order: Order
    images: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    normalise: Normalise
    crop: Crop | None

    @property
    def num_images(self) -> int:
        """Images in the split, over all replicas."""
        return len(self.order.indices)

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader.epoch`."""
        crop = self.crop if self.order.seed is not None else None
        draws = None if crop is None else crop.draw(len(self.images), self.order.seed or 0, "augment", epoch)
        batches = self.order.batches(epoch, start)
        if not batches:
            return
        # Moved once an epoch: a copy to the device from ordinary memory waits for the device.
        device = self.images.device
        draws = None if draws is None else draws.to(device)
        for index in torch.cat(batches).to(device).split([len(batch) for batch in batches]):
            images = self.images[index]
            if crop is not None and draws is not None:
                images = crop(images, draws[index])
            yield self.normalise(images), self.targets[index]


def decoded_batches(
    images: torch.utils.data.Dataset[Any],
    batches: Sequence[Tensor],
    workers: int,
    collate: Callable[[list[Any]], Any] = list,
    pin_memory: bool = False,
) -> torch.utils.data.DataLoader[Any]:
    """What ``images`` gives for the indices of each batch, decoded by ``workers`` processes; 0 for this one."""
    return torch.utils.data.DataLoader(
        images,
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=randomness.generator("workers"),  # else the loader would draw from torch's global one
    )


def sound(
    items: Iterable[tuple[int, Any]], on_damage: OnDamage, skipped: dict[str, str], path_of: Callable[[int], str]
) -> list[Any]:
    """The images of a batch that can be used; an item that is a text says why it cannot.

    Raises:
        DataError: one cannot be used, and ``on_damage`` is ``raise``; with ``skip`` it is noted in ``skipped``.
    """
    good = []
    for index, item in items:
        if not isinstance(item, str):
            good.append(item)
        elif on_damage == "raise":
            raise DataError(item)
        else:
            skipped[path_of(index)] = item
    return good


@dataclass(frozen=True, eq=False)
class Files:
    """A split held as image files, decoded and transformed by ``workers`` processes (0: by this one).

    ``samples`` are (path, class) pairs; ``read`` gives the decoded image of a path, and ``augment`` or ``fit`` makes it
    uint8 (C, H, W), for training or evaluation. What they draw is keyed by (seed, epoch, image index), in any worker.
    """

    order: Order
    samples: list[tuple[str, int]] = field(repr=False)
    read: Callable[[str], Any] = field(repr=False)
    augment: Callable[[Any], Tensor] = field(repr=False)
    fit: Callable[[Any], Tensor] = field(repr=False)
    normalise: Normalise
    workers: int
    device: torch.device

    @property
    def num_images(self) -> int:
        """Images in the split, over all replicas."""
        return len(self.order.indices)

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader.epoch`.

        Raises:
            DataError: a file cannot be decoded; the message names it.
        """
        batches = self.order.batches(epoch, start)
        pin = self.device.type == "cuda"
        for batch in decoded_batches(_Decoded(self, epoch), batches, self.workers, _collate, pin):
            if isinstance(batch, DataError):
                raise batch
            images, targets = (x.to(self.device, non_blocking=True) for x in batch)
            yield self.normalise(images), targets


@dataclass(frozen=True, eq=False)
class _Decoded(torch.utils.data.Dataset[Any]):
    """One epoch's images by index; a file that cannot be read gives its error, to be raised outside the workers."""

    split: Files
    epoch: int

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        path, target = self.split.samples[index]
        try:
            image = self.split.read(path)
        except Exception as error:  # the decoders of damaged files raise nearly anything
            return DataError(f"cannot decode image {path} (number {index}): {error}. Replace or remove this file.")
        seed = self.split.order.seed
        if seed is None:
            return self.split.fit(image), target
        with randomness.seeded_everywhere(seed, "augment", self.epoch, index):
            return self.split.augment(image), target


def _collate(items: list[tuple[Tensor, int] | DataError]) -> Batch | DataError:
    decoded: list[tuple[Tensor, int]] = []
    for item in items:
        if isinstance(item, DataError):
            return item
        decoded.append(item)
    images, targets = zip(*decoded, strict=True)
    return torch.stack(images), torch.tensor(targets)
