"""Decoded pictures, kept in the memory of the machine as far as there is room, for this process and its workers."""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from localgrad.measure.process_memory import free_memory

_PIECE = 24  # of 2**24 bytes: after each one the free memory is looked at again


class Room:
    """Memory for decoded pictures, which workers that are forked from this process share and fill too.

    It is half of the memory that was free at first. Bytes are taken as pictures come, and no more of them once less
    than that half is free, whoever took it: the training of this run, or another run.
    """

    def __init__(self) -> None:
        self.size = free_memory() // 2
        self._bytes = _shared(self.size, np.uint8)
        self._taken = _shared(2, np.int64)  # bytes and pictures, so far
        self._lock = multiprocessing.get_context("fork").Lock()

    def __str__(self) -> str:
        taken, pictures = self._taken
        return (
            f"pictures are decoded once and kept in memory: {pictures} in {taken / 2**30:.2f} GiB so far, of at most "
            f"{self.size / 2**30:.1f} GiB, half of what was free"
        )

    def put(self, pixels: np.ndarray) -> int | None:
        """The place of a copy of ``pixels`` uint8; None if there is no room."""
        # A worker that was killed may have died with the lock: what cannot have it at once goes on without.
        if not self._lock.acquire(block=False):
            return None
        try:
            start = int(self._taken[0])
            stop = start + pixels.size
            if stop > self.size or (start >> _PIECE != stop >> _PIECE and free_memory() < self.size):
                return None
            self._taken += pixels.size, 1
        finally:
            self._lock.release()
        self._bytes[start:stop] = pixels.reshape(-1)
        return start

    def get(self, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """What was put there."""
        return self._bytes[start : start + int(np.prod(shape))].reshape(shape)


def room_for(workers: int) -> Room | str:
    """Room for pictures that ``workers`` processes share, or why there is none."""
    begun = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if workers and begun != "fork":
        return f"workers that Python begins by {begun} do not share memory"
    if "fork" not in multiprocessing.get_all_start_methods() or not free_memory():
        return "this system does not tell how much memory is free"
    try:
        return Room()
    except OSError as error:
        return f"no memory could be reserved ({error})"


@dataclass(frozen=True, eq=False)
class Kept:
    """Gives the picture of an item (path, class, number) and its class; reads each once as long as there is room.

    Args:
        room: where pictures are kept; a string for none.
        count: of items.
        make: the picture of a path, a PIL image in RGB, the same one each time.
    """

    room: Room | str = field(repr=False)
    count: int
    make: Callable[[str], Any] = field(repr=False)
    places: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Start, height and width of each; a height of 0 for those that are not kept.
        object.__setattr__(self, "places", _shared(3 * self.count, np.int64).reshape(-1, 3))

    def __call__(self, item: tuple[str, int, int]) -> tuple[Any, int]:
        from PIL import Image

        path, target, number = item
        if isinstance(self.room, str):
            return self.make(path), target
        start, height, width = map(int, self.places[number])
        if height:
            return Image.fromarray(self.room.get(start, (height, width, 3))), target
        picture = self.make(path)
        pixels = np.asarray(picture)
        if (place := self.room.put(pixels)) is not None:
            self.places[number, ::2] = place, pixels.shape[1]
            self.places[number, 1] = pixels.shape[0]  # last: it says that the others are there
        return picture, target


def _shared(count: int, kind: Any) -> np.ndarray:
    """Zeros that processes forked from this one see and change."""
    return np.frombuffer(mmap.mmap(-1, max(1, count) * np.dtype(kind).itemsize), kind)
