"""Pictures kept in memory: the same batches as without, from no file, and never more memory than there is."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from localgrad import data
from localgrad.data import kept
from localgrad.data.kept import Kept, Room, room_for
from localgrad.errors import DataError
from localgrad.measure.process_memory import free_memory

SPLITS = ("train", "validation", "test")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, 7 training and 2 test pictures of each, of several sizes, one of them grey and one turned."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 2)):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(generator.integers(0, 256, (20 + 7 * i, 50 - 5 * i, 3), np.uint8))
                exif = Image.Exif()
                exif[0x112] = 6 if i == 1 else 1
                (picture.convert("L") if i == 0 else picture).save(tmp_path / split / label / f"{i}.png", exif=exif)
    return tmp_path


def load(root: Path, **options: Any) -> data.Data:
    return data.load(f"folder:{root}", **({"batch_size": 4, "image_size": 16, "validation": 0.25} | options))


def read_anew(split: Any) -> Any:
    """The loader that decodes every file again in every epoch."""
    return dataclasses.replace(split, read=Kept("not kept", split.read.count, split.read.make))


def assert_equal(left: Any, right: Any) -> None:
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for (x, y), (a, b) in zip(left, right, strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)


@pytest.mark.parametrize(
    ("workers", "replicas", "splits", "augment"),
    [(0, 2, SPLITS, True), (0, 1, SPLITS, False), (2, 1, ("train",), True)],
)
def test_batches_from_memory_are_those_from_files(
    workers: int, replicas: int, splits: tuple[str, ...], augment: bool, root: Path
) -> None:
    """Any epoch, entered at any batch, on any replica: once all was read, the files can go."""
    shares = [load(root, workers=workers, augment=augment, replica=r, num_replicas=replicas) for r in range(replicas)]
    wanted = []
    for split in (getattr(share, name) for share in shares for name in splits):
        wanted.append((split, list(dataclasses.replace(read_anew(split), workers=0).epoch(3))))
        for epoch in range(50):  # a replica meets all images in time; of two workers one may not get the lock
            list(split.epoch(epoch))
            if split.read.places[split.order.indices, 1].all():
                break
    for name in ("train", "val"):
        shutil.rmtree(root / name)
    for split, batches in wanted:
        assert_equal(split.epoch(3), batches)
        assert_equal(split.epoch(3, start=len(split) - 1), batches[-1:])
        with pytest.raises(DataError, match="No such file"):
            list(read_anew(split).epoch(3))


def test_training_pictures_can_be_evaluated(root: Path) -> None:
    """The loader of training and its evaluation keep different pictures of the same file."""
    found: Any = load(root, validation=0)
    list(found.train.epoch(0))
    still = dataclasses.replace(found.train, order=dataclasses.replace(found.train.order, seed=None))
    plain: Any = load(root, validation=0, augment=False).train
    assert_equal(still.epoch(0), dataclasses.replace(plain, order=still.order).epoch(0))


def test_what_has_no_room_is_read_again(root: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(kept, "free_memory", lambda: 2 * 10_000)
    loader: Any = load(root, validation=0).train
    for _ in range(2):
        assert_equal(loader.epoch(1), read_anew(loader).epoch(1))
    sizes = loader.read.places[:, 1] * loader.read.places[:, 2] * 3
    assert 0 < (sizes > 0).sum() < 14 and sizes.sum() <= 10_000
    assert f"{(sizes > 0).sum()} in" in loader.how and "half of what was free" in loader.how


def test_nothing_more_is_kept_once_half_of_the_free_memory_is_gone(monkeypatch: Any) -> None:
    free = 2**12
    monkeypatch.setattr(kept, "free_memory", lambda: free)
    monkeypatch.setattr(kept, "_PIECE", 6)
    found = Room()
    pixels = np.ones(64, np.uint8)
    assert found.put(pixels) == 0 and found.put(pixels) == 64
    free = 2**11 - 1  # another run took it
    assert found.put(pixels) is None
    free = 2**12
    assert found.put(pixels) == 128


@settings(max_examples=50, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12), size=st.integers(0, 600))
def test_pictures_come_back_as_they_were(shapes: list[tuple[int, int]], size: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kept, "free_memory", lambda: 2 * size)
        found = Room()
    generator, places = np.random.default_rng(0), []
    for height, width in shapes:
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        taken = sum(one.size for _, one in places)
        place = found.put(pixels)
        assert (place is None) == (taken + pixels.size > size)
        if place is not None:
            places.append((place, pixels))
    for place, pixels in places:
        assert (found.get(place, pixels.shape) == pixels).all()


def test_a_lock_that_a_dead_worker_holds_stops_nothing(root: Path) -> None:
    loader: Any = load(root, validation=0).train
    wanted = list(read_anew(loader).epoch(0))
    loader.room._lock.acquire()
    assert_equal(loader.epoch(0), wanted)
    assert ": 0 in" in loader.how


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_said_in_every_epoch_and_never_kept(workers: int, root: Path) -> None:
    whole = (root / "train/a/2.png").read_bytes()
    (root / "train/a/2.png").write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"a/2\.png"):
        list(load(root, validation=0, workers=workers).train.epoch(0))
    loader: Any = load(root, validation=0, workers=workers, on_damage="skip").train
    alone = dataclasses.replace(read_anew(loader), workers=0)
    for epoch in (0, 1):
        loader.skipped.clear()
        assert_equal(loader.epoch(epoch), alone.epoch(epoch))
        assert [Path(path).name for path in loader.skipped] == ["2.png"]
    (root / "train/a/2.png").write_bytes(whole)
    assert sum(len(targets) for _, targets in loader.epoch(2)) == 14


def test_why_nothing_is_kept(root: Path, monkeypatch: Any) -> None:
    assert isinstance(room_for(2), Room)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    assert isinstance(room_for(0), Room)
    assert "begins by spawn" in load(root, workers=2).train.how
    monkeypatch.setattr(kept, "free_memory", lambda: 0)
    loader = load(root).train
    assert "does not tell how much memory" in loader.how and "every epoch" in loader.how
    assert_equal(loader.epoch(0), loader.epoch(0))


V2 = {"memory.current": "900000", "memory.stat": "anon 7\ninactive_file 100000\n"}
V1 = {"memory.usage_in_bytes": "600000", "memory.stat": "total_inactive_file 50000\n"}


@pytest.mark.parametrize(
    ("groups", "place", "files", "free"),
    [
        ("0::/\n", "", {}, 1_024_000),
        ("0::/\n", "", V2 | {"memory.max": "max"}, 1_024_000),
        ("0::/\n", "", V2 | {"memory.max": "1000000"}, 200_000),
        ("0::/job/step\n", "job", V2 | {"memory.max": "1000000"}, 200_000),
        ("0::/job/step\n", "other", V2 | {"memory.max": "1000000"}, 1_024_000),
        ("0::/\n", "", V2 | {"memory.max": "700000"}, 0),
        ("3:cpu:/\n4:memory:/job\n0::/\n", "memory/job", V1 | {"memory.limit_in_bytes": "800000"}, 250_000),
        ("4:memory:/host/job\n", "memory", V1 | {"memory.limit_in_bytes": "800000"}, 250_000),
        ("4:memory:/job\n", "memory/job", V1 | {"memory.limit_in_bytes": "9223372036854771712"}, 1_024_000),
    ],
)
def test_free_memory_is_the_least_of_what_limits_it(
    groups: str, place: str, files: dict[str, str], free: int, tmp_path: Path
) -> None:
    available = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n"
    written = {f"sys/fs/cgroup/{place}/{name}": text for name, text in files.items()}
    for name, text in (written | {"proc/meminfo": available, "proc/self/cgroup": groups}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_memory(tmp_path) == free


def test_free_memory_of_this_machine_and_of_one_that_does_not_tell(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == 0
    assert free_memory() > 2**20
