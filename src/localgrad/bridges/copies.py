"""Copies of the model's own units, for auxiliary networks that look like the rest of the network."""

from __future__ import annotations

import copy
from typing import Literal

from torch import nn

from localgrad.initialization import fresh, kaiming

Init = Literal["source", "fresh", "kaiming"]


def copied(unit: nn.Module, init: Init) -> nn.Module:
    """A copy with the weights of ``unit``, with those its layers draw when they are built (``fresh``), or these with
    convolutions drawn by `localgrad.initialization.kaiming`.
    """
    made = copy.deepcopy(unit).requires_grad_(True)
    if init != "source":
        fresh(made)
    if init == "kaiming":
        kaiming(made)
    made.train()  # on a line of its own: some models' train() returns nothing
    return made
