"""One reader of pictures: formats, modes and orientations through every way in, right pixels or a named refusal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from localgrad import data
from localgrad.data import boxes, folders, masks
from localgrad.data.pictures import read_ids, read_picture
from localgrad.errors import DataError
from localgrad.train.predict import Trained, predict

GREY = np.kron(np.linspace(10, 240, 12).round().astype(np.uint8).reshape(3, 4), np.ones((16, 16), np.uint8))
COLOUR = np.stack([GREY, 255 - GREY, np.full_like(GREY, 90)], 2)  # 48 x 64, patches of 16 that JPEG keeps
# What a camera held so stores of the upright picture: the inverse of what the orientation asks for.
STORED = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: x.swapaxes(0, 1)[::-1], 7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[:, ::-1],
}  # fmt: skip


def saved(path: Path, pixels: np.ndarray, mode: str | None = None, orientation: int = 1, **how: Any) -> Path:
    picture = Image.fromarray(np.ascontiguousarray(STORED[orientation](pixels)))
    exif = Image.Exif()
    exif[0x112] = orientation
    (picture if mode is None else picture.convert(mode)).save(path, exif=exif, **how)
    return path


def alpha(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 60, np.uint8)], 2)


FILES: dict[str, tuple[Any, np.ndarray | str]] = {  # how it is written, and what must be seen or said
    "grey.png": (lambda p: saved(p, GREY), GREY),
    "grey.jpg": (lambda p: saved(p, GREY, quality=95), GREY),
    "grey.tif": (lambda p: saved(p, GREY), GREY),
    "grey.bmp": (lambda p: Image.fromarray(GREY).save(p), GREY),
    "grey.pgm": (lambda p: Image.fromarray(GREY).save(p), GREY),
    "bits.png": (lambda p: Image.fromarray(GREY > 100).save(p), (255 * (GREY > 100)).astype(np.uint8)),
    "grey16.png": (lambda p: saved(p, GREY.astype(np.uint16) * 257), GREY),
    "grey16.tif": (lambda p: Image.fromarray(GREY.astype(np.uint16) * 257).save(p), GREY),
    "grey16.pgm": (lambda p: p.write_bytes(b"P5 64 48 65535\n" + (GREY.astype(">u2") * 257).tobytes()), GREY),
    "int32.tif": (lambda p: Image.fromarray(GREY.astype(np.int32) * 257).save(p), "32-bit integers"),
    "float.tif": (lambda p: Image.fromarray(GREY.astype(np.float32) / 255).save(p), "floats"),
    "rgb.png": (lambda p: saved(p, COLOUR), COLOUR),
    "rgb.jpg": (lambda p: saved(p, COLOUR, quality=95, subsampling=0), COLOUR),
    "progressive.jpg": (lambda p: saved(p, COLOUR, quality=95, subsampling=0, progressive=True), COLOUR),
    "rgb.jfif": (lambda p: saved(p, COLOUR, quality=95, subsampling=0, format="JPEG"), COLOUR),
    "rgb.webp": (lambda p: saved(p, COLOUR, lossless=True), COLOUR),
    "rgb.avif": (lambda p: saved(p, COLOUR, quality=95), COLOUR),
    "rgb.tif": (lambda p: saved(p, COLOUR), COLOUR),
    "rgb.bmp": (lambda p: Image.fromarray(COLOUR).save(p), COLOUR),
    "rgb.ppm": (lambda p: Image.fromarray(COLOUR).save(p), COLOUR),
    "la.png": (lambda p: Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY // 2)]).save(p), GREY),
    "rgba.png": (lambda p: Image.fromarray(alpha(COLOUR)).save(p), COLOUR),
    "rgba.webp": (lambda p: Image.fromarray(alpha(COLOUR)).save(p, lossless=True, exact=True), COLOUR),
    "palette.png": (lambda p: saved(p, GREY, "P"), GREY),
    "pa.png": (lambda p: saved(p, GREY, "P", transparency=b"\x10" * 256), GREY),
    "palette.gif": (lambda p: Image.fromarray(GREY).convert("P").save(p), GREY),
    "animated.gif": (
        lambda p: Image.fromarray(GREY).convert("P").save(
            p, save_all=True, append_images=[Image.fromarray(255 - GREY).convert("P")]
        ),
        GREY,
    ),
    "animated.webp": (
        lambda p: Image.fromarray(COLOUR).save(
            p, save_all=True, append_images=[Image.fromarray(255 - COLOUR)], lossless=True
        ),
        COLOUR,
    ),
    "cmyk.jpg": (lambda p: saved(p, COLOUR, "CMYK", quality=95, subsampling=0), COLOUR),
    "cmyk.tif": (lambda p: saved(p, COLOUR, "CMYK"), COLOUR),
    "thin.png": (lambda p: Image.fromarray(np.full((1, 3000), 7, np.uint8)).save(p), np.full((1, 3000), 7, np.uint8)),
    "truncated.jpg": (lambda p: p.write_bytes(saved(p, COLOUR, quality=95).read_bytes()[:-300]), "(?i:truncated)"),
    "truncated.png": (lambda p: p.write_bytes(saved(p, COLOUR).read_bytes()[:90]), "cannot read"),
    "empty.png": (lambda p: p.write_bytes(b""), "cannot identify"),
    "text.jpg": (lambda p: p.write_text("no picture"), "cannot identify"),
    "pipe.png": (lambda p: os.mkfifo(p), "no ordinary file"),
    "folder.png": (lambda p: p.mkdir(), "no ordinary file"),
}  # fmt: skip
for turned in range(1, 9):
    FILES[f"turned{turned}.jpg"] = (
        lambda p, k=turned: saved(p, COLOUR, None, k, quality=95, subsampling=0),
        COLOUR,
    )
    FILES[f"turned{turned}.png"] = (lambda p, k=turned: saved(p, GREY.astype(np.uint16) * 257, None, k), GREY)
READERS = {
    "folder": lambda path: np.asarray(folders.read_fitted(lambda picture: picture, str(path))),
    "mask": lambda path: masks.read_pair((str(path), str(mask_for(path))), masks.class_ids({0: 0}))[0].permute(1, 2, 0),
    "boxes": lambda path: boxes.read_boxed(boxes.boxed(path, []))[0].permute(1, 2, 0),
    "picture": lambda path: np.asarray(read_picture(path)),
}


def mask_for(path: Path) -> Path:
    height, width = FILES[path.name][1].shape[:2] if isinstance(FILES[path.name][1], np.ndarray) else (48, 64)
    made = path.with_name(f"mask-{path.stem}.png")
    Image.fromarray(np.zeros((height, width), np.uint8)).save(made)
    return made


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FILES)
def test_every_format_through_every_reader(name: str, reader: str, tmp_path: Path) -> None:
    write, expected = FILES[name]
    path = tmp_path / name
    write(path)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=f"{name}.*{expected}|{expected}.*{name}"):
            READERS[reader](path)
        return
    seen = np.asarray(READERS[reader](path)).astype(int)
    wanted = (expected if expected.ndim == 3 else np.stack([expected] * 3, 2)).astype(int)
    assert seen.shape == wanted.shape
    assert np.abs(seen - wanted).mean() < (3 if path.suffix in (".jpg", ".jfif", ".avif") else 0.5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ending=st.sampled_from([".png", ".webp", ".jpg"]),
    mode=st.sampled_from(["L", "P", "RGB", "RGBA", "LA", "CMYK", "1"]),
    orientation=st.integers(1, 8),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
)
def test_orientation_and_mode_in_any_combination(
    ending: str, mode: str, orientation: int, height: int, width: int, tmp_path: Path
) -> None:
    """Grey of one value above a row of another: what is up and how large it is does not depend on how it is stored."""
    pixels = np.full((height, width), 255, np.uint8)
    pixels[0] = 0
    path = tmp_path / f"p{ending}"
    try:
        saved(path, pixels, mode, orientation, **({"lossless": True} if ending == ".webp" else {}))
    except (OSError, ValueError):
        return  # the format has no such mode
    seen = np.asarray(read_picture(path, "L")).astype(int)
    assert seen.shape == (height, width)
    if ending != ".jpg":
        assert np.abs(seen - pixels).max() <= 1


def test_masks_turn_as_their_pictures(tmp_path: Path) -> None:
    ids = np.zeros((6, 8), np.uint8)
    ids[:2] = 1
    for orientation in STORED:
        assert (read_ids(saved(tmp_path / "m.png", ids, None, orientation)) == ids).all()


# --- class folders -----------------------------------------------------------------------------------------------


def make(root: Path, *names: str, size: tuple[int, int] = (20, 24)) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size, 3), 80, np.uint8)).save(path)


def test_hidden_entries_are_no_classes(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    make(tmp_path, "train/.ipynb_checkpoints/1.png", "train/a/.hidden.png", "train/a/.git/1.png", "train/a/deep/2.png")
    found = data.load(f"folder:{tmp_path}", batch_size=2, image_size=8, validation=0)
    assert found.classes == ("a", "b") and found.train.num_samples == 3


def test_three_splits_are_used_as_they_are_named(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.png", "train/a/2.png", "val/a/1.png", "val/a/2.png", "val/a/3.png", "test/a/1.png")
    found = data.load(f"folder:{tmp_path}", batch_size=2, image_size=8)
    assert found.validation is not None
    assert [split.num_samples for split in (found.train, found.validation, found.test)] == [2, 3, 1]
    assert data.load(f"folder:{tmp_path}", batch_size=2, image_size=8, validation=0).validation is None


def test_what_is_no_picture_is_counted(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.png", "val/a/1.png")
    (tmp_path / "train/a/notes.txt").write_text("x")
    (tmp_path / "val/a/array.npy").write_text("x")
    with pytest.warns(UserWarning, match=r"2 files .* no pictures by their ending \(.npy, .txt\)"):
        data.load(f"folder:{tmp_path}", batch_size=1, image_size=8, validation=0)


@pytest.mark.parametrize("to", ["train/a", "train"])
def test_a_folder_linked_twice_is_refused(to: str, tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.png", "val/a/1.png")
    (tmp_path / "train" / "a" / "again").symlink_to(tmp_path / to)
    with pytest.raises(DataError, match="one folder by way of a link"):
        data.load(f"folder:{tmp_path}", batch_size=1, image_size=8, validation=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_obeys_on_damage_in_folders(workers: int, tmp_path: Path) -> None:
    """A file that cannot be read and one that no transform can make a picture of."""
    make(tmp_path, "train/a/1.png", "train/a/2.png", "val/a/1.png")
    make(tmp_path, "train/a/thin.png", size=(1, 3000))
    (tmp_path / "train/a/bad.png").write_bytes(b"")
    arguments: Any = {"batch_size": 4, "image_size": 8, "validation": 0, "workers": workers, "augment": False}
    with pytest.raises(DataError, match=r"(bad|thin)\.png"):
        list(data.load(f"folder:{tmp_path}", **arguments).train.epoch(0))
    found = data.load(f"folder:{tmp_path}", on_damage="skip", **arguments).train
    assert sum(len(inputs) for inputs, _ in found.epoch(0)) in (2, 3)  # torchvision may make something of the thin one
    assert isinstance(found, data.loaders.Files)
    assert any("bad.png" in path for path in found.skipped)


@pytest.mark.parametrize("damage, words", [("raise", "1.png"), ("skip", "")])
def test_a_transform_that_fails_is_damage_of_its_picture(damage: Any, words: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        make(tmp_path / "images" / split, "0.png", size=(64, 64))
        make(tmp_path / "images" / split, "1.png", size=(1, 3000))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        said = {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in range(2)],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [4, 4, 20, 20]}],
        }
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(said))
    found = boxes.load(f"coco:{tmp_path}", batch_size=2, image_size=64, validation=0, on_damage=damage)
    if words:
        with pytest.raises(DataError, match=words):
            list(found.train.epoch(0))
    else:
        assert [len(inputs) for inputs, _ in found.train.epoch(0)] == [1]


# --- predict -----------------------------------------------------------------------------------------------------


class Seeing(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return torch.zeros(1, 2)


@pytest.mark.parametrize("width", [96, 160])
def test_predict_sees_what_evaluation_sees(width: int, tmp_path: Path) -> None:
    pixels = np.kron(
        np.random.default_rng(0).integers(0, 255, (6, width // 16, 3), np.uint8), np.ones((16, 16, 1), np.uint8)
    )
    for split in ("train", "val"):
        for kind in "ab":
            (tmp_path / split / kind).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / kind / "p.png")
    found = data.load(f"folder:{tmp_path}", batch_size=1, image_size=64, validation=0)
    config: Any = SimpleNamespace(data=SimpleNamespace(image_size=64, name=f"folder:{tmp_path}"))
    model = Seeing(1, 1)
    trained = Trained(model, config, "classification", found.classes, found.input_shape, found.mean, found.std)
    list(predict(trained, [tmp_path / "val" / "a" / "p.png"]))
    assert torch.equal(model.seen, next(iter(found.test.epoch(0)))[0])


def test_two_answers_are_never_written_to_one_file() -> None:
    trained: Any = SimpleNamespace(kind="segmentation", model=Seeing(1, 1))
    with pytest.raises(DataError, match=r"a/p.jpg and b/p.png would both be written as p"):
        list(predict(trained, [Path("a/p.jpg"), Path("b/p.png")]))
