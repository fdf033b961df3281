"""Data sets: `load` gives the loaders of a set by its name, `available` says which sets lie where.
`masks` is the same for images with a class for every pixel, `boxes` for images with boxes, `text` for plain text.

Order and augmentation are functions of (seed, epoch, batch or image), so an epoch can be entered at any batch::

    data = localgrad.data.load("cifar10", batch_size=1024, device="cuda")
    for inputs, targets in data.train.epoch(3, start=7):
        ...
"""

from localgrad import named
from localgrad.data import boxes, masks, own, text
from localgrad.data.catalogue import available, load
from localgrad.data.dataset import Data, Found, root_of
from localgrad.data.loaders import Loader
from localgrad.data.own import Splits
from localgrad.data.paths import full_name
from localgrad.data.sources import SOURCES

__all__ = [
    "Data",
    "Found",
    "Loader",
    "Splits",
    "available",
    "boxes",
    "root_of",
    "full_name",
    "kind_of",
    "load",
    "masks",
    "reads_files",
    "text",
]


def reads_files(name: str) -> bool:
    """Whether a classification set is read image by image, and so cropped, not from one array."""
    kind = "imagefolder" if name.startswith("folder:") else name
    return kind in SOURCES and SOURCES[kind].layouts[0].unpack is not None


def kind_of(name: str) -> str:
    """The task that a data set is for, as `localgrad.tasks` calls it; data of the user's own say it themselves."""
    if named.is_named(name) and not (any(of.knows(name) for of in (masks, boxes, text)) or name.startswith("folder:")):
        return own.read(name).kind
    if text.knows(name):
        return "language_model"
    return "segmentation" if masks.knows(name) else "detection" if boxes.knows(name) else "classification"
