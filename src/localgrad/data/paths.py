"""Which kind of data a folder holds, by what lies in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from localgrad.data import boxes, masks, text
from localgrad.data.dataset import root_of
from localgrad.data.sources import SOURCES
from localgrad.errors import ConfigError

# Prefix -> what must lie in the folder, and whether it does.
FORMS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "folder": (
        "train/<class>/* and val/<class>/* or test/<class>/*",
        lambda root: _classes(root / "train") and any((root / split).is_dir() for split in ("val", "test")),
    ),
    "masks": (
        "images/<split>/*, masks/<split>/*.png and classes.txt",
        lambda root: (root / "images").is_dir() and (root / "masks").is_dir(),
    ),
    "coco": (
        "annotations/instances_<split>.json and the images",
        lambda root: any((root / "annotations").glob("instances_*.json")),
    ),
    "voc": (
        "JPEGImages, Annotations and ImageSets/Main/<split>.txt",
        lambda root: (root / "ImageSets" / "Main").is_dir() and (root / "Annotations").is_dir(),
    ),
    "text": ("train/*.txt and test/*.txt", lambda root: all(any((root / s).glob("*.txt")) for s in ("train", "test"))),
}


def full_name(name: str) -> str:
    """``name`` as it is, or a prefix of `FORMS` before it where it is the path of a folder of that form alone.

    Raises:
        ConfigError: a folder of no form, or of several.
    """
    root = root_of(name)
    if name in SOURCES or any(of.knows(name) for of in (masks, boxes, text)) or not name or not root.is_dir():
        return name
    found = [prefix for prefix, (_, holds) in FORMS.items() if holds(root)]
    if len(found) == 1:
        return f"{found[0]}:{name}"
    if found:
        written = " or ".join(f"{prefix}:{name}" for prefix in found)
        raise ConfigError(f"data {name!r} could be {' and '.join(found)}, by what lies there; write {written}")
    known = "; ".join(f"{prefix}:{name} with {holds}" for prefix, (holds, _) in FORMS.items())
    raise ConfigError(f"data {name!r} is a folder of no known form; known: {known}")


def _classes(split: Path) -> bool:
    return split.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in split.iterdir())
