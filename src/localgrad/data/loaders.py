"""Batches as a pure function of (seed, epoch, batch), whatever was drawn before and however many workers help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from localgrad import randomness
from localgrad.data.augment import Crop, Normalise
from localgrad.data.kept import Room
from localgrad.errors import ConfigError, DataError

Batch = tuple[Tensor, Any]
OnDamage = Literal["raise", "skip"]


@runtime_checkable
class Loader(Protocol):
    """The batches of one split."""

    @property
    def num_samples(self) -> int:
        """Images in the split, over all replicas."""

    @property
    def how(self) -> str:
        """Where the images of an epoch come from, and why from there."""

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
    def num_samples(self) -> int:
        """Images in the split, over all replicas."""
        return len(self.order.indices)

    @property
    def how(self) -> str:
        """See `Loader.how`."""
        return f"all images are one tensor on {self.images.device}"

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


@dataclass(frozen=True, eq=False)
class Files:
    """A split held as files, read and transformed by ``workers`` processes (0: by this one).

    What a transform draws is keyed by (seed, epoch, index), in any worker.

    Args:
        order: which items make up which batch; one with a seed is one for training.
        items: what is known of each image; the first entry is its path.
        read: the sample of an item, image and target; raises `DataError` if it cannot be used.
        augment, fit: transforms of image and target together, for training and for evaluation.
        stack: a batch of samples as inputs and targets.
        finish: what is done to inputs on the device.
        workers: processes.
        device: where batches are given.
        on_damage: ``raise`` for an image that cannot be used, or ``skip`` it; ``skipped`` then says why, by its path.
        watch: told the targets of every batch, and None at the end of an epoch that was read whole.
        room: where ``read`` keeps what it has read, or why files are read again in every epoch.
    """

    order: Order
    items: Sequence[tuple[Any, ...]] = field(repr=False)
    read: Callable[[Any], tuple[Any, Any]] = field(repr=False)
    augment: Callable[..., Any] = field(repr=False)
    fit: Callable[..., Any] = field(repr=False)
    stack: Callable[[list[Any]], Batch] = field(repr=False)
    finish: Callable[[Tensor], Tensor] = field(repr=False)
    workers: int
    device: torch.device
    on_damage: OnDamage = "raise"
    watch: Callable[[Any], None] | None = None
    skipped: dict[str, str] = field(default_factory=dict, repr=False)
    room: Room | str = "only pictures of class folders are kept in memory"

    @property
    def num_samples(self) -> int:
        """Images in the split, over all replicas."""
        return len(self.order.indices)

    @property
    def how(self) -> str:
        """See `Loader.how`."""
        return f"files are read in every epoch: {self.room}" if isinstance(self.room, str) else str(self.room)

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader.epoch`; a batch that lost every image is left out.

        Raises:
            DataError: an image cannot be used; the message names the file.
        """
        loader: Any = torch.utils.data.DataLoader(
            _Read(self, epoch),
            batch_sampler=[batch.tolist() for batch in self.order.batches(epoch, start)],
            num_workers=self.workers,
            collate_fn=partial(_gathered, self.stack),
            pin_memory=self.device.type == "cuda",
            generator=randomness.generator("workers"),  # else the loader would draw from torch's global one
        )
        for problems, batch in loader:
            for index, error in problems:
                if self.on_damage == "raise" or not isinstance(error, DataError):
                    raise error
                self.skipped[self.items[index][0]] = str(error)
            if batch is not None:
                if self.watch is not None:
                    self.watch(batch[1])
                inputs, targets = tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), batch)
                yield self.finish(inputs), targets
        if self.watch is not None and start == 0:
            self.watch(None)


@dataclass(frozen=True, eq=False)
class _Read(torch.utils.data.Dataset[Any]):
    """One epoch's samples by index; what is wrong with one is returned, to be raised outside the workers."""

    split: Files
    epoch: int

    def __getitem__(self, index: int) -> tuple[int, Any]:
        split, seed = self.split, self.split.order.seed
        try:
            sample = split.read(split.items[index])
        except DataError as error:
            return index, error
        try:
            if seed is None:
                return index, split.fit(*sample)
            with randomness.seeded_everywhere(seed, "augment", self.epoch, index):
                return index, split.augment(*sample)
        except Exception as error:  # a picture of one pixel may fail in any transform
            return index, DataError(
                f"picture {split.items[index][0]} cannot be transformed: {' '.join(str(error).split())}. Remove it, or "
                "set data.on_damage=skip to leave it out."
            )


def _gathered(stack: Callable[[list[Any]], Batch], found: list[tuple[int, Any]]) -> tuple[list[Any], Batch | None]:
    """What is wrong with samples of a batch, by index, and the others as one."""
    problems = [(index, sample) for index, sample in found if isinstance(sample, DataError)]
    sound = [sample for _, sample in found if not isinstance(sample, DataError)]
    try:
        return problems, stack(sound) if sound else None
    except ConfigError as error:
        return [(found[0][0], error)], None
