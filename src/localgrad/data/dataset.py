"""What a data set is once it is loaded, and where data sets are looked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from localgrad import randomness
from localgrad.data import cache
from localgrad.data.loaders import Loader
from localgrad.errors import ConfigError


@dataclass(frozen=True)
class Data:
    """A data set ready to train on.

    ``input_shape`` is that of a training sample, (C, H, W) of images, (T,) of text; ``mean`` and ``std`` (C floats,
    units of [0, 1]) are what images were normalised by; ``classes`` of text are its tokens; ``validation`` is None
    where none was asked for; ``kind`` names the task its targets are for, as `localgrad.tasks` does, or is
    ``module:function``; ``scored`` is what the split in ``test`` is called where it lies, which is ``val`` where there
    is no test split.
    """

    name: str
    title: str
    num_classes: int
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Loader
    validation: Loader | None
    test: Loader
    kind: str = "classification"
    scored: str = "test"


class Found(NamedTuple):
    """One line of `available`; ``where`` is the folder of a set that was found, else what is missing."""

    name: str
    title: str
    found: bool
    where: str


def root_of(root: str | Path | None = None) -> Path:
    """``root`` with ``~`` as the home of a user, where there is one by that name.

    None is the environment variable ``LOCALGRAD_DATA``, else ``data`` in the current folder, else ``data`` in the cache
    folder.
    """
    named = root or os.environ.get("LOCALGRAD_DATA")
    if not named:
        return Path("data") if Path("data").is_dir() else cache.folder() / "data"
    return Path(os.path.expanduser(named))


def hold_out(indices: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """``indices`` cut into a held-out ``fraction`` and the rest, both in their old order."""
    count = round(len(indices) * fraction)
    if (fraction > 0 and count == 0) or count == len(indices):
        raise ConfigError(
            f"validation={fraction} of {len(indices)} training images leaves an empty split; "
            "use validation=0, another fraction or a larger limit"
        )
    order = torch.randperm(len(indices), generator=randomness.generator("validation"))
    return indices[order[:count].sort().values], indices[order[count:].sort().values]
