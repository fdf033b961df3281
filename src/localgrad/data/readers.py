"""Reading the files of each resident set into uint8 arrays; damage is refused with the file's name."""

from __future__ import annotations

import gzip
import importlib
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localgrad import randomness
from localgrad.data import cache
from localgrad.errors import DataError

Arrays = tuple[np.ndarray, np.ndarray]
"""Images uint8 (N, C, H, W) and labels (N,) of one split."""


def torchvision(part: str) -> Any:
    """The module ``torchvision.<part>``, imported only when a data set needs it.

    Raises:
        DataError: torchvision is missing or does not fit torch.
    """
    try:
        return importlib.import_module(f"torchvision.{part}")
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise DataError(
            f"torchvision cannot be imported: {error}. Most often this is a CPU build of torch beside a CUDA build of "
            "torchvision, or the reverse; install a matching pair, both from the same index, for example "
            "`pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu`."
        ) from error


def digits(place: Path, split: str) -> Arrays:
    archive = _npz(place / "digits.npz", "images", "labels")
    images, labels = archive["images"][:, None], archive["labels"]
    order = torch.randperm(len(images), generator=randomness.generator("digits", "split")).numpy()
    chosen = order[:1437] if split == "train" else order[1437:]
    return images[chosen], labels[chosen]


def _npz(path: Path, *names: str) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}. It should hold {', '.join(names)}; fetch it again.") from error


def cifar10_jpeg(place: Path, split: str) -> Arrays:
    path = place / f"cifar10_{split}_jpeg.npz"
    archive = _npz(path, "jpeg", "offsets", "labels")
    data, offsets, labels = archive["jpeg"].tobytes(), archive["offsets"], archive["labels"]
    if len(offsets) != len(labels) + 1 or offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
        raise DataError(
            f"{path} is damaged: {len(labels)} labels and {len(offsets)} offsets into {len(data)} bytes do not fit "
            "(N labels need N + 1 rising offsets, from 0 to the number of bytes). Fetch it again."
        )

    def decode() -> np.ndarray:
        from PIL import Image

        images = np.empty((len(labels), 3, 32, 32), np.uint8)
        for i in range(len(labels)):
            try:
                picture = Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]]))
                images[i] = np.asarray(picture).transpose(2, 0, 1)
            except Exception as error:  # the decoders of damaged files raise nearly anything
                raise DataError(
                    f"{path} is damaged: image {i} is no 32x32 RGB JPEG: {error}. Fetch it again."
                ) from error
        return images

    images = cache.array(f"cifar10-{split}-{cache.sha256(path)[:16]}.npy", decode)
    return images, labels


def fashion_mnist(place: Path, split: str) -> Arrays:
    prefix = place / "FashionMNIST" / "raw" / ("train" if split == "train" else "t10k")
    images = _idx(Path(f"{prefix}-images-idx3-ubyte.gz"), dimensions=3)
    return images[:, None], _idx(Path(f"{prefix}-labels-idx1-ubyte.gz"), dimensions=1)


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of a gzipped idx file: magic number 0x0800 + dimensions, then sizes, all big-endian int32."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}. Fetch it again.") from error
    header = np.frombuffer(content[: 4 * (1 + dimensions)], ">i4") if len(content) >= 4 * (1 + dimensions) else None
    if header is None or header[0] != 0x0800 + dimensions:
        found = f"begins with {content[:4].hex() or 'nothing'}"
        raise DataError(f"{path} {found}, but an idx file of this kind begins with {0x0800 + dimensions:08x}.")
    shape, pixels = tuple(int(n) for n in header[1:]), len(content) - header.nbytes
    if pixels != int(np.prod(shape)):
        raise DataError(f"{path} is damaged: it announces shape {shape} but holds {pixels} bytes. Fetch it again.")
    return np.frombuffer(content, np.uint8, offset=header.nbytes).reshape(shape)


def torchvision_set(kind: str, place: Path, split: str) -> Arrays:
    """Through torchvision's reader, which checks the md5 sum of every file before it reads one."""
    datasets = torchvision("datasets")
    which = {"train": split == "train"} if kind == "CIFAR10" else {"split": split}
    try:
        data = getattr(datasets, kind)(str(place), **which)
    except ModuleNotFoundError as error:
        raise DataError(f"reading {kind} needs {error.name}; run `pip install localgrad[{kind.lower()}]`.") from error
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"the {kind} files in {place.resolve()} are damaged or incomplete: {error}") from error
    images, labels = data.data, data.targets if kind == "CIFAR10" else data.labels
    return (images.transpose(0, 3, 1, 2) if kind == "CIFAR10" else images), np.asarray(labels)
