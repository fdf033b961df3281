"""Data sets and loaders: what is drawn depends on (seed, epoch, image) alone, and damage is refused by name."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from localgrad import data, randomness
from localgrad.data import cache, readers, sources
from localgrad.data.augment import Crop, Normalise, resize
from localgrad.data.loaders import Order
from localgrad.errors import ConfigError, DataError

CASES = {"digits": {}, "folder": {"image_size": 16}, "folder-workers": {"image_size": 16, "workers": 2}}


@pytest.fixture(autouse=True)
def _no_real_data(monkeypatch: Any, tmp_path: Any, request: Any) -> None:
    if "data" not in request.keywords:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("LOCALGRAD_DATA", str(tmp_path / "nothing"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: Any) -> Path:
    """A tiny folder set: 3 classes, 8 training and 3 test images of each, of several sizes and one of them grey."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("val", 3)):
        for c, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (20 + i, 30 - i, 3), generator=randomness.generator(split, c, i))
                picture = Image.fromarray(pixels.to(torch.uint8).numpy())
                (picture.convert("L") if i == 1 else picture).save(root / split / name / f"{i}.png")
    return root


def load(case: str, images: Path, **options: Any) -> data.Data:
    name = "digits" if case == "digits" else f"folder:{images}"
    return data.load(name, **({"batch_size": 5 if "folder" in case else 100} | CASES[case] | options))


def joined(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def assert_equal(left: Any, right: Any) -> None:
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for (x, y), (a, b) in zip(left, right, strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)


# ------------------------------------------------------------------------------------------------ pure functions


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_entered_late_goes_on_as_it_would_have(case: Any, images: Any) -> None:
    train = load(case, images).train
    whole = list(train.epoch(3))
    assert len(whole) == len(train)
    torch.rand(7)  # what was drawn before does not matter
    assert_equal(train.epoch(3, start=2), whole[2:])
    assert_equal(load(case, images).train.epoch(3), whole)
    assert list(train.epoch(3, start=len(train))) == []


@pytest.mark.parametrize("case", CASES)
def test_epochs_and_seeds_differ_and_evaluation_does_not(case: Any, images: Any) -> None:
    zero, one = load(case, images, seed=0), load(case, images, seed=1)
    first = joined(zero.train.epoch(0))
    assert not torch.equal(joined(zero.train.epoch(1))[0], first[0])
    assert not torch.equal(joined(one.train.epoch(0))[0], first[0])
    for split in ("validation", "test"):
        assert_equal(getattr(zero, split).epoch(0), getattr(one, split).epoch(5))


def test_workers_change_no_bit(images: Any) -> None:
    for split in ("train", "validation", "test"):
        alone, helped = (getattr(load("folder", images, workers=n), split) for n in (0, 2))
        assert_equal(alone.epoch(1, start=0), helped.epoch(1, start=0))


@pytest.mark.parametrize("case", CASES)
def test_global_generators_are_left_alone(case: Any, images: Any) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(load(case, images).train.epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


@pytest.mark.parametrize("case", ["digits", "folder"])
def test_replicas_share_the_batches_of_one_process(case: Any, images: Any) -> None:
    options = {"batch_size": 6, "drop_last": case == "digits"}
    one = list(load(case, images, **options).train.epoch(2))
    parts = [list(load(case, images, **options, replica=r, num_replicas=3).train.epoch(2)) for r in range(3)]
    assert_equal((joined(shares) for shares in zip(*parts, strict=True)), one)


def test_batch_shapes_and_lengths(images: Any) -> None:
    digits = data.load("digits", batch_size=100, eval_batch_size=50, validation=0.1)
    assert (digits.train.num_samples, digits.validation.num_samples, digits.test.num_samples) == (1293, 144, 360)
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (13, 3, 8)
    assert [len(y) for _, y in digits.test.epoch(0)] == [50] * 7 + [10]
    assert len(list(data.load("digits", batch_size=100, drop_last=True).train.epoch(0))) == 12
    inputs, targets = next(digits.train.epoch(0))
    assert inputs.shape == (100, *digits.input_shape) == (100, 1, 8, 8)
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert digits.num_classes == len(digits.classes) == 10
    folder = load("folder", images)
    assert folder.input_shape == (3, 16, 16) and folder.classes == ("ant", "bee", "cat")
    assert next(folder.test.epoch(0))[0].shape == (5, 3, 16, 16)
    assert "tensor" not in repr(digits)


# ----------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("case", ["digits", "folder"])
def test_validation_is_disjoint_fixed_and_from_the_training_images(case: Any, images: Any) -> None:
    split = load(case, images, validation=0.25)
    train, held = split.train.order.indices, split.validation.order.indices
    every = load(case, images, validation=0).train.order.indices
    assert torch.equal(torch.cat([train, held]).sort().values, every)
    assert len(held) == round(len(every) / 4)
    assert torch.equal(load(case, images, validation=0.25, seed=9).validation.order.indices, held)
    assert load(case, images, validation=0).validation is None


def test_digits_split_covers_the_set_once() -> None:
    whole = np.load(Path(sources.__file__).with_name("digits.npz"), allow_pickle=False)
    parts = [readers.digits(Path(sources.__file__).parent, split) for split in ("train", "test")]
    assert [len(x) for x, _ in parts] == [1437, 360]
    both = np.concatenate([np.concatenate([x.reshape(-1, 64), y[:, None]], 1) for x, y in parts])
    wanted = np.concatenate([whole["images"].reshape(-1, 64), whole["labels"][:, None]], 1)
    assert sorted(map(bytes, both)) == sorted(map(bytes, wanted))


def test_limit_takes_the_first_images_before_validation_is_held_out(images: Any) -> None:
    few = data.load("digits", batch_size=10, limit=50, validation=0.2)
    assert (few.train.num_samples, few.validation.num_samples, few.test.num_samples) == (40, 10, 360)
    assert torch.equal(few.train.images[:50], data.load("digits", batch_size=10).train.images[:50])
    folder = load("folder", images, limit=9, validation=0)
    _, targets = joined(folder.train.epoch(0))
    assert len(targets) == 9 and len(set(targets.tolist())) == 3  # not one class only


def test_digits_are_normalised_by_their_own_statistics() -> None:
    inputs, _ = joined(data.load("digits", batch_size=500, validation=0, augment=False).train.epoch(0))
    assert abs(inputs.mean()) < 1e-3 and abs(inputs.std() - 1) < 1e-3


# ----------------------------------------------------------------------------------------------- augmentation


def literal_crop(image: np.ndarray, down: int, right: int, flip: int, pad: int, reflect: bool) -> np.ndarray:
    """One image (C, H, W), the obvious way: pad, cut out, mirror."""
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect" if reflect else "constant")
    cut = padded[:, down : down + image.shape[1], right : right + image.shape[2]]
    return cut[:, :, ::-1] if flip else cut


@pytest.mark.parametrize("crop", [Crop(4, reflect=True), Crop(2, flip=False), Crop(4), Crop(0), Crop(1, flip=False)])
def test_crop_equals_the_literal_one(crop: Any) -> None:
    batch = torch.randint(0, 256, (64, 3, 9, 11), generator=randomness.generator("crop"), dtype=torch.uint8)
    draws = crop.draw(64, 0, "augment", 1)
    cut: Any = literal_crop
    wanted = [cut(x.numpy(), *map(int, d), crop.pad, crop.reflect) for x, d in zip(batch, draws, strict=True)]
    got = crop(batch, draws)
    assert got.dtype == torch.uint8 and np.array_equal(got.numpy(), np.stack(wanted))
    assert draws[:, :2].min() == 0 and draws[:, :2].max() == 2 * crop.pad
    assert set(draws[:, 2].tolist()) == ({0, 1} if crop.flip else {0})


def test_the_loader_crops_each_image_by_its_own_draw() -> None:
    loader = data.load("digits", batch_size=64, seed=4).train
    raw, _ = readers.digits(Path(sources.__file__).parent, "train")
    draws = Crop(1, flip=False).draw(len(raw), 4, "augment", 2)
    order = loader.order.indices[torch.randperm(1293, generator=randomness.generator(4, "order", 2))]
    cut: Any = literal_crop
    literal = np.stack([cut(raw[i], *map(int, draws[i]), 1, False) for i in order.tolist()])
    inputs, _ = joined(loader.epoch(2))
    assert np.allclose(inputs.numpy(), (literal / 16 - 0.3045) / 0.376, atol=1e-6)


def test_augment_false_only_shuffles(images: Any) -> None:
    for case in ("digits", "folder"):
        plain = load(case, images, augment=False, validation=0).train
        left, right = joined(plain.epoch(0)), joined(plain.epoch(1))
        assert not torch.equal(left[1], right[1])
        assert torch.allclose(left[0].sum(), right[0].sum(), rtol=1e-3, atol=1e-2)
        assert torch.equal(left[0].flatten(1).sort(0).values, right[0].flatten(1).sort(0).values)


def test_normalise_and_resize() -> None:
    batch = torch.randint(0, 17, (3, 1, 8, 8), dtype=torch.uint8, generator=randomness.generator("resize"))
    assert torch.allclose(Normalise((0.5,), (0.25,), 16)(batch), (batch / 16 - 0.5) / 0.25)
    assert torch.equal(resize(batch, 8, 16), (batch * (255 / 16)).round().to(torch.uint8))
    larger = data.load("digits", batch_size=32, image_size=16)
    inputs, _ = joined(larger.test.epoch(0))
    assert inputs.shape == (360, 1, 16, 16) and abs(inputs.mean()) < 0.1 and larger.train.crop.pad == 2
    assert torch.equal(next(load_native().test.epoch(0))[0], next(load_native(image_size=8).test.epoch(0))[0])


def load_native(**options: Any) -> Any:
    return data.load("digits", batch_size=32, **options)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
        ({"validation": 1.0}, r"\[0, 1\)"),
        ({"validation": -0.1}, r"\[0, 1\)"),
        ({"validation": float("nan")}, r"\[0, 1\)"),
        ({"limit": 0}, "limit=0"),
        ({"limit": 3, "validation": 0.1}, "empty split"),
        ({"limit": 1, "validation": 0.9}, "empty split"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 100_000}, "image_size=100000"),
        ({"workers": -1}, "workers=-1"),
        ({"replica": 2, "num_replicas": 2}, "replica=2"),
        ({"batch_size": 9, "num_replicas": 2}, "multiple"),
        ({"batch_size": 2000, "drop_last": True}, "no batch"),
        ({"batch_size": 1292, "num_replicas": 4}, "too few for 4 replicas"),
    ],
)
def test_bad_arguments(options: Any, words: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        data.load("digits", **({"batch_size": 8} | options))


def test_start_beyond_the_epoch() -> None:
    with pytest.raises(ConfigError, match="use 0 to 2"):
        Order(torch.arange(5), 3).batches(0, start=3)


def test_unknown_and_missing_sets(tmp_path: Any) -> None:
    with pytest.raises(DataError, match=r"did you mean 'cifar10'.*folder, or module:function"):
        data.load("cifar11", batch_size=8)
    for name in ("cifar10", "fashion_mnist", "svhn", "stl10", "imagenette224", "imagefolder"):
        with pytest.raises(DataError) as caught:
            data.load(name, batch_size=8, root=tmp_path)
        message = str(caught.value)
        assert str(tmp_path) in message and "LOCALGRAD_DATA" in message and "http" in message and "\n" not in message
    lines = data.available(tmp_path)
    assert [line.name for line in lines if line.found] == ["digits"]
    assert all(line.where.startswith("not in") for line in lines if not line.found)


def write_idx(path: Path, array: np.ndarray, magic: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.array([magic or 0x0800 + array.ndim, *array.shape], ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), 1))


@pytest.fixture
def fashion(tmp_path: Any) -> Path:
    raw = tmp_path / "FashionMNIST" / "raw"
    for prefix, count in (("train", 20), ("t10k", 8)):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=randomness.generator(prefix)).numpy()
        write_idx(raw / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return raw


def test_fashion_mnist(fashion: Any, tmp_path: Any) -> None:
    split = data.load("fashion_mnist", root=tmp_path, batch_size=4, augment=False)
    assert (split.train.num_samples, split.validation.num_samples, split.test.num_samples) == (18, 2, 8)
    assert split.input_shape == (1, 28, 28)
    raw = np.frombuffer(gzip.decompress((fashion / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    inputs, targets = joined(split.test.epoch(0))
    assert np.allclose(inputs.numpy().ravel(), (raw / 255 - 0.286) / 0.353, atol=1e-5)
    assert targets.tolist() == list(range(8))


def test_damaged_idx_files(fashion: Any, tmp_path: Any) -> None:
    def refused(name: Any, content: Any, words: Any) -> None:
        path = fashion / f"{name}-ubyte.gz"
        good = path.read_bytes()
        content(path) if callable(content) else path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            data.load("fashion_mnist", root=tmp_path, batch_size=4)
        path.write_bytes(good)

    name = "train-images-idx3"
    whole = (fashion / f"{name}-ubyte.gz").read_bytes()
    refused(name, whole[:-500], "train-images.*is damaged")
    refused(name, b"", "train-images.*begins with nothing")
    refused(name, b"not a gzip file", "is damaged: Not a gzipped")
    refused(name, lambda path: write_idx(path, np.zeros((20, 28, 28)), magic=0x0D03), "begins with 00000d03.*00000803")
    refused(name, gzip.compress(gzip.decompress(whole)[:-3]), r"announces shape \(20, 28, 28\)")
    refused("t10k-labels-idx1", lambda path: write_idx(path, np.arange(7)), "8 test images but 7 labels")
    refused("t10k-labels-idx1", lambda path: write_idx(path, np.arange(8) + 5), "labels run from 5 to 12")
    refused(name, lambda path: write_idx(path, np.zeros((20, 14, 14))), r"\(20, 1, 14, 14\)")


def write_cifar(root: Path, count: int = 12, spoil: int | None = None, **changes: Any) -> None:
    for split in ("train", "test"):
        files = []
        for i in range(count):
            stream, shade = io.BytesIO(), np.full((32, 32, 3), 20 * i, np.uint8)
            Image.fromarray(shade).save(stream, "JPEG")
            files.append(b"broken" if i == spoil else stream.getvalue())
        arrays = {
            "jpeg": np.frombuffer(b"".join(files), np.uint8),
            "offsets": np.cumsum([0, *map(len, files)]),
            "labels": np.arange(count, dtype=np.uint8) % 10,
        }
        np.savez(root / f"cifar10_{split}_jpeg.npz", **(arrays | changes))


def test_cifar10_jpeg_is_decoded_once(tmp_path: Any, monkeypatch: Any) -> None:
    write_cifar(tmp_path)
    first = data.load("cifar10", root=tmp_path, batch_size=4)
    assert first.title == "CIFAR-10 (JPEG q75 copy)" and first.train.images[3, 0, 0, 0] == 60
    (kept,) = cache.folder().glob("cifar10-test-*.npy")
    monkeypatch.setattr(Image, "open", None)  # decoding again would fail
    assert torch.equal(data.load("cifar10", root=tmp_path, batch_size=4).test.images, first.test.images)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept.write_bytes(kept.read_bytes()[:200])  # a damaged cache is made again
    assert torch.equal(data.load("cifar10", root=tmp_path, batch_size=4).test.images, first.test.images)
    assert not list(cache.folder().glob("*.part"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no cache: slower, not fatal
    assert torch.equal(data.load("cifar10", root=tmp_path, batch_size=4).test.images, first.test.images)


def test_damaged_cifar10(tmp_path: Any) -> None:
    write_cifar(tmp_path, spoil=5)
    with pytest.raises(DataError, match=r"cifar10_train_jpeg.npz is damaged: image 5 "):
        data.load("cifar10", root=tmp_path, batch_size=4)
    write_cifar(tmp_path, labels=np.zeros(3, np.uint8))
    with pytest.raises(DataError, match="3 labels and 13 offsets"):
        data.load("cifar10", root=tmp_path, batch_size=4)
    path = tmp_path / "cifar10_train_jpeg.npz"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"cifar10_train_jpeg.npz is damaged"):
        data.load("cifar10", root=tmp_path, batch_size=4)


@pytest.mark.parametrize(("name", "words"), [("cifar10", "CIFAR10"), ("svhn", "SVHN"), ("stl10", "STL10")])
def test_files_with_a_wrong_md5_sum(name: Any, words: Any, tmp_path: Any) -> None:
    (layout, *_) = sources.SOURCES[name].layouts
    for file in layout.files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(DataError, match=f"the {words} files in .* are damaged"):
        data.load(name, root=tmp_path, batch_size=4)


class FakeSets:
    """Stands in for ``torchvision.datasets``, whose real files are not at hand."""

    class CIFAR10:
        def __init__(self, root: Any, train: Any) -> None:
            self.data, self.targets = np.zeros((20, 32, 32, 3), np.uint8), [i % 10 for i in range(20)]

    class STL10:
        def __init__(self, root: Any, split: Any) -> None:
            self.data, self.labels = np.zeros((20, 3, 96, 96), np.uint8), np.arange(20, dtype=np.uint8) % 10

    class SVHN:
        def __init__(self, root: Any, split: Any) -> None:
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")


def test_sets_read_by_torchvision(tmp_path: Any, monkeypatch: Any) -> None:
    for name in ("cifar10", "svhn", "stl10"):
        for file in sources.SOURCES[name].layouts[0].files:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
    monkeypatch.setattr(readers, "torchvision", lambda part: FakeSets)
    assert data.load("cifar10", root=tmp_path, batch_size=4).title == "CIFAR-10"
    stl10 = data.load("stl10", root=tmp_path, batch_size=4)
    assert next(stl10.train.epoch(0))[0].shape == (4, 3, 96, 96) and stl10.num_classes == 10
    with pytest.raises(DataError, match=r"needs scipy; run `pip install localgrad\[svhn\]`"):
        data.load("svhn", root=tmp_path, batch_size=4)


def test_broken_torchvision(images: Any, monkeypatch: Any) -> None:
    def broken(name: Any) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(readers.importlib, "import_module", broken)
    with pytest.raises(DataError, match=r"nms does not exist.*CPU build of torch beside a CUDA build.*matching pair"):
        load("folder", images)
    data.load("digits", batch_size=8)


def test_import_leaves_torchvision_alone() -> None:
    code = "import sys, localgrad.data; sys.exit('torchvision' in sys.modules or 'PIL' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_damaged_folders(tmp_path: Any) -> None:
    def refused(words: Any) -> None:
        with pytest.raises(DataError, match=words):
            data.load(f"folder:{tmp_path}", batch_size=2, validation=0)

    refused(r"not found.*no train")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    refused("has the folders train; it needs")
    (tmp_path / "val").mkdir()
    refused("should hold <class>/<image> files.*'ant' holds no picture")
    picture = Image.new("RGB", (20, 20))
    picture.save(tmp_path / "train" / "ant" / "a.jpg")
    refused("val should hold")
    (tmp_path / "val" / "bee").mkdir()
    picture.save(tmp_path / "val" / "bee" / "a.jpg")
    refused("differ in their class folders: ant, bee")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Any, workers: Any) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "ant").mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / split / "ant" / "a.jpg")
    (tmp_path / "train" / "ant" / "b.jpg").write_bytes((tmp_path / "train" / "ant" / "a.jpg").read_bytes()[:-300])
    split = data.load("imagefolder", root=tmp_path, batch_size=2, validation=0, workers=workers)
    with pytest.raises(DataError, match=r"^cannot read picture .*b.jpg"):
        list(split.train.epoch(0))


def write_tars(images: Path, root: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(root / f"imagenette224_{split}.tar", "w") as archive:
            archive.add(images / split, split)


def test_tars_are_unpacked_once(images: Any, tmp_path: Any) -> None:
    write_tars(images, tmp_path)
    split = data.load("imagenette224", root=tmp_path, batch_size=4, image_size=16)
    assert (split.train.num_samples, split.test.num_samples) == (22, 9)
    (folder,) = cache.folder().iterdir()
    before = folder.stat().st_mtime_ns
    again = data.load("imagenette224", root=tmp_path, batch_size=4, image_size=16)
    assert_equal(again.train.epoch(0), split.train.epoch(0))
    assert folder.stat().st_mtime_ns == before and list(cache.folder().iterdir()) == [folder]


def test_damaged_and_unsafe_tars(images: Any, tmp_path: Any) -> None:
    write_tars(images, tmp_path)
    path = tmp_path / "imagenette224_train.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"imagenette224_train.tar is damaged"):
        data.load("imagenette224", root=tmp_path, batch_size=4)
    with tarfile.open(path, "w") as archive:
        archive.add(images / "train" / "ant" / "0.png", "../outside.png")
    with pytest.raises(DataError, match="unsafe to unpack"):
        data.load("imagenette224", root=tmp_path, batch_size=4)
    assert list(cache.folder().iterdir()) == [] and not (tmp_path / "outside.png").exists()


# ---------------------------------------------------------------------------------------------------- real sets


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("cifar10", (50_000, 10_000)),
        ("fashion_mnist", (60_000, 10_000)),
        ("svhn", (73_257, 26_032)),
        ("stl10", (5_000, 8_000)),
        ("imagenette224", (4_000, 1_000)),
    ],
)
def test_real_sets(name: Any, counts: Any) -> None:
    root = Path(os.environ.get("LOCALGRAD_DATA") or Path(__file__).parents[2] / "data")
    found = {line.name: line for line in data.available(root)}[name]
    if not found.found:
        pytest.skip(f"{name} {found.where}")
    split = data.load(name, root=root, batch_size=256, validation=0, augment=False)
    assert (split.train.num_samples, split.test.num_samples) == counts
    inputs, targets = next(split.train.epoch(0))
    assert inputs.shape == (256, *split.input_shape) and set(targets.tolist()) == set(range(10))
    usual = name not in ("svhn", "stl10")  # those are scaled by 0.5 and 0.5 instead
    assert inputs.isfinite().all() and (not usual or (abs(inputs.mean()) < 0.25 and 0.7 < inputs.std() < 1.4))


def test_data_lie_where_the_variable_says_or_here_or_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALGRAD_DATA", "elsewhere")
    assert data.root_of() == Path("elsewhere") and data.root_of("given") == Path("given")
    monkeypatch.delenv("LOCALGRAD_DATA")
    assert data.root_of() == tmp_path / "cache" / "localgrad" / "data"
    (tmp_path / "data").mkdir()
    assert data.root_of() == Path("data")
