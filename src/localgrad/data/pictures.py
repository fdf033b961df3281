"""The one reader of image files: for class folders, masks, boxes and `localgrad predict`."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any, Literal

import numpy as np

from localgrad.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".avif")
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")


def read_picture(path: str | Path, mode: Literal["RGB", "L"] = "RGB") -> Any:
    """The picture in a file as it is meant to be seen: a PIL image of 8 bits a channel.

    It is turned as its EXIF orientation says. 16-bit grey is scaled by 1 / 257, palettes and CMYK are converted, alpha
    is left out, of an animation the first frame is read.

    Raises:
        DataError: no file, a file of another kind, damaged or truncated, too many pixels for Pillow's limit, or numbers
            that are no grey values (32-bit integers, floats). It names the file and the reason.
    """
    from PIL import ImageOps

    picture, kind = _decoded(path)
    if picture.mode in _GREY_16 or (picture.mode == "I" and kind in ("PNG", "PPM")):  # of 16 bits there
        picture = _scaled(picture)
    elif picture.mode in ("I", "F"):
        values = "32-bit integers" if picture.mode == "I" else "floats"
        raise unusable(path, f"it holds {values}, whose range no file tells; write 8 or 16 bits a channel")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return ImageOps.exif_transpose(picture.convert(mode))


def read_ids(path: str | Path) -> np.ndarray:
    """The numbers in a mask file, uint8 (H, W), palette entries as their index; turned as `read_picture` turns.

    Raises:
        DataError: as `read_picture`, or a file that has more than one channel of 8 bits.
    """
    from PIL import ImageOps

    picture, _ = _decoded(path)
    if picture.mode not in ("L", "P", "1"):
        raise DataError(
            f"mask {path} is a picture of mode {picture.mode}; write class ids as a PNG of one 8-bit channel."
        )
    return np.array(ImageOps.exif_transpose(picture)).astype(np.uint8)


def _decoded(path: str | Path) -> tuple[Any, str]:
    """The first frame with its EXIF data, before any conversion, and the format of the file; TIFF comes turned."""
    from PIL import Image

    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError("it is no ordinary file")  # a pipe would wait for ever
        with Image.open(path) as picture:
            picture.load()
            return picture.copy(), str(picture.format)
    except Exception as error:  # the decoders of damaged files raise nearly anything
        raise unusable(path, " ".join(str(error).split()) or type(error).__name__) from error


def _scaled(picture: Any) -> Any:
    """16-bit grey as 8-bit grey, with the same EXIF data."""
    from PIL import Image

    values = np.asarray(picture).astype(np.float64)
    made = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    made.info = dict(picture.info)
    return made


def unusable(path: str | Path, reason: str) -> DataError:
    """The error that names a picture and why it is of no use."""
    return DataError(
        f"cannot read picture {path}: {reason}. Replace or remove it; in training data.on_damage=skip leaves it out."
    )
