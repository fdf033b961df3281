"""Tensors in the local variables of a call stack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from localgrad.batches import tensors_in

Tag = tuple[
    str, ...
]  # who holds a tensor: ("returns", module, place), ("takes", ...) or ("frame", function, name, place)


def held_by_frames(frame: Any) -> Iterator[tuple[Tag, Tensor]]:
    """Tensors with a graph in local variables of the frames from ``frame`` outwards, lists and mappings opened."""
    while frame is not None:
        values = frame.f_locals
        code = frame.f_code
        for name, value in list(values.items()):
            if isinstance(value, (Tensor, list, tuple, dict)):
                for place, leaf in enumerate(tensors_in(value)):
                    if leaf.grad_fn is not None:
                        yield ("frame", code.co_qualname, name, str(place)), leaf
        if isinstance(values, dict) and code.co_flags & 1:
            values.clear()  # before Python 3.13 the frame keeps this copy of its variables, and with it the tensors
        frame = frame.f_back
