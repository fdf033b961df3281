"""Copies of the model's own units, for auxiliary networks that look like the rest of the network."""

from __future__ import annotations

import copy
from typing import Literal

from torch import nn

Init = Literal["source", "fresh"]


def copied(unit: nn.Module, init: Init) -> nn.Module:
    """A copy with the weights of ``unit`` or, if ``fresh``, with those its layers draw when they are built."""
    made = copy.deepcopy(unit).requires_grad_(True)
    if init == "fresh":
        for module in made.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    made.train()  # on a line of its own: some models' train() returns nothing
    return made
