"""Where each data set lies, what its files are and how its images are augmented and normalised.

``digits`` ships with localgrad (`digits.npz`): 1797 handwritten digits of 8x8 pixels with values 0 .. 16, the test part
of the Optical Recognition of Handwritten Digits set by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0; stored as uint8, otherwise unchanged. Its split into 1437
training and 360 test images is localgrad's own, a fixed keyed permutation. Every other set is the user's copy.

Source: CIFAR-10, SVHN and STL-10 as in the released code of Wang et al., Revisiting Locally Supervised Learning,
ICLR 2021, arXiv:2101.10832, which MAN, MAN++, HPFF and MLAAN reuse; ImageNet as in torchvision's references.
Differs: STL-10 has its ten classes, where that code builds a network for a hundred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from localgrad.data import cache, readers
from localgrad.data.augment import Crop
from localgrad.errors import DataError


@dataclass(frozen=True)
class Layout:
    """One way a set may lie on disk: ``files`` below one of ``places`` below the root; the first complete one wins.

    ``read(place, "train" or "test")`` gives the arrays of a resident set; ``unpack(place)`` instead gives the folder of
    a set of image files.
    """

    files: tuple[str, ...]
    places: tuple[str, ...] = ("",)
    read: Callable[[Path, str], readers.Arrays] | None = None
    unpack: Callable[[Path], Path] | None = None
    title: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set: ``shape`` (C, H, W) of its images, ``mean`` and ``std`` per channel in units of [0, 1]."""

    title: str
    layouts: tuple[Layout, ...]
    get: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]
    classes: tuple[str, ...] = field(default=(), repr=False)
    crop: Crop | None = None
    peak: int = 255

    def search(self, root: Path) -> tuple[Layout, Path] | list[str]:
        """The layout found below ``root`` and its place, or else where it looked and what is missing there."""
        looked = []
        for layout in self.layouts:
            for place in (root / place for place in layout.places):
                missing = [file for file in layout.files if not (place / file).exists()]
                if not missing:
                    return layout, place
                looked.append(f"{place.resolve()} (no {missing[0]})")
        return looked

    def locate(self, name: str, root: Path) -> tuple[Layout, Path]:
        """As `search`.

        Raises:
            DataError: not found; says where it looked, what should lie there and how to get it.
        """
        found = self.search(root)
        if isinstance(found, tuple):
            return found
        expected = ", or ".join(", ".join(layout.files) for layout in self.layouts)
        raise DataError(
            f"data set {name!r} ({self.title}) not found. Looked in {'; '.join(found)}. Expected there: {expected}. "
            f"{self.get} Then point data.root (root=...) or the environment variable LOCALGRAD_DATA at the folder."
        )

    def read(self, layout: Layout, place: Path, split: str) -> readers.Arrays:
        """The images uint8 (N, C, H, W) and labels (N,) of ``split``, "train" or "test", checked.

        Raises:
            DataError: they are damaged, or are not what this set holds.
        """
        assert layout.read is not None
        images, labels = layout.read(place, split)
        if len(images) != len(labels):
            raise DataError(f"{place}: {len(images)} {split} images but {len(labels)} labels; fetch the set again.")
        if images.shape[1:] != self.shape or images.dtype != np.uint8 or len(images) == 0:
            raise DataError(f"{place}: {split} images are {images.dtype} {images.shape}, not uint8 (N, *{self.shape}).")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(f"{place}: {split} labels are {labels.dtype} {labels.shape}, not whole numbers (N,).")
        if labels.min() < 0 or labels.max() >= len(self.classes):
            last = len(self.classes) - 1
            raise DataError(f"{place}: {split} labels run from {labels.min()} to {labels.max()}, not from 0 to {last}.")
        return images, labels


def _imagenette(place: Path) -> Path:
    tars = [place / f"imagenette224_{split}.tar" for split in ("train", "val")]
    return cache.unpacked(f"imagenette224-{cache.sha256(*tars)[:16]}", tars)


_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TEN = tuple("0123456789")
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
_STL10 = "airplane bird car cat deer dog horse monkey ship truck"
_STL10_FILES = ("train_X", "train_y", "unlabeled_X", "test_X", "test_y")  # torchvision checks the unlabelled file too
_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_FASHION_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_IMAGENETTE = (
    "tench,English springer,cassette player,chain saw,church,French horn,garbage truck,gas pump,golf ball,parachute"
)

SOURCES = {
    "digits": Source(
        title="UCI optical digits, 8x8",
        layouts=(Layout(("digits.npz",), (str(Path(__file__).parent),), readers.digits),),
        get="It ships with localgrad; reinstall it.",
        mean=(0.3045,),
        std=(0.3760,),
        shape=(1, 8, 8),
        classes=_TEN,
        crop=Crop(pad=1, flip=False),
        peak=16,
    ),
    "cifar10": Source(
        title="CIFAR-10",
        layouts=(
            Layout(
                tuple(f"cifar-10-batches-py/{file}" for file in _CIFAR10_FILES),
                ("", "cifar10"),
                partial(readers.torchvision_set, "CIFAR10"),
            ),
            Layout(
                ("cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz"),
                ("", "cifar10"),
                readers.cifar10_jpeg,
                title="CIFAR-10 (JPEG q75 copy)",
            ),
        ),
        get="Get and unpack the python version, https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz.",
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        shape=(3, 32, 32),
        classes=tuple(_CIFAR10.split()),
        crop=Crop(pad=4, reflect=True),
    ),
    "fashion_mnist": Source(
        title="Fashion-MNIST",
        layouts=(
            Layout(
                tuple(f"FashionMNIST/raw/{file}-ubyte.gz" for file in _FASHION_FILES),
                ("", "fashion_mnist"),
                readers.fashion_mnist,
            ),
        ),
        get="Get the four files from https://github.com/zalandoresearch/fashion-mnist.",
        mean=(0.2860,),
        std=(0.3530,),
        shape=(1, 28, 28),
        classes=tuple(_FASHION.split(",")),
        crop=Crop(pad=2),
    ),
    "svhn": Source(
        title="SVHN (train and test, no extra)",
        layouts=(
            Layout(
                ("train_32x32.mat", "test_32x32.mat"),
                ("", "svhn"),
                partial(readers.torchvision_set, "SVHN"),
            ),
        ),
        get="Get both files from http://ufldl.stanford.edu/housenumbers/.",
        mean=_HALF,
        std=_HALF,
        shape=(3, 32, 32),
        classes=_TEN,
        crop=Crop(pad=2, flip=False),
    ),
    "stl10": Source(
        title="STL-10 (labelled part)",
        layouts=(
            Layout(
                tuple(f"stl10_binary/{file}.bin" for file in _STL10_FILES),
                ("", "stl10"),
                partial(readers.torchvision_set, "STL10"),
            ),
        ),
        get="Get and unpack http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz.",
        mean=_HALF,
        std=_HALF,
        shape=(3, 96, 96),
        classes=tuple(_STL10.split()),
        crop=Crop(pad=4),
    ),
    "imagenette224": Source(
        title="Imagenette (4000 + 1000 images, squashed to 224x224)",
        layouts=(
            Layout(
                ("imagenette224_train.tar", "imagenette224_val.tar"),
                ("", "imagenette224"),
                unpack=_imagenette,
            ),
        ),
        get="It is a re-encoded subset; for the whole set unpack a release of https://github.com/fastai/imagenette and "
        "write folder:/path.",
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        shape=(3, 224, 224),
        classes=tuple(_IMAGENETTE.split(",")),
    ),
    "imagefolder": Source(
        title="images in folders, ImageNet layout",
        layouts=(Layout(("train",), unpack=lambda place: place),),
        get="Sort image files as train/<class>/* and val/<class>/* (or test/<class>/*); ImageNet itself comes from "
        "https://image-net.org.",
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        shape=(3, 224, 224),
    ),
}
