"""Tensors in the local variables of a model's call stack."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from localgrad.batches import call_model, tensors_in

Tag = tuple[
    str, ...
]  # who holds a tensor: ("returns", module, place), ("takes", ...) or ("frame", function, name, place)


def depth_of(tag: Tag) -> int:
    """How deep in the model the module of a tag lies; local variables come after every module."""
    return 1 << 30 if tag[0] == "frame" else tag[1].count(".")


def outermost(model: Any, inputs: Any) -> Any:
    """``model`` on a batch; the frames within this call are the model's."""
    return call_model(model, inputs)


def held_by_frames(frame: Any) -> Iterator[tuple[Tag, Tensor]]:
    """Tensors with a graph in local variables of the model's frames, from ``frame`` outwards; lists, tuples and
    mappings are opened.
    """
    while frame is not None and frame.f_code is not outermost.__code__:
        values = frame.f_locals
        code = frame.f_code
        for name, value in list(values.items()):
            if isinstance(value, (Tensor, list, tuple, dict)) and value is not values:
                for place, leaf in enumerate(tensors_in(value)):
                    if leaf.grad_fn is not None:
                        yield ("frame", code.co_qualname, name, str(place)), leaf
        # Before Python 3.13 the frame keeps this copy of its variables, and with it the tensors. Nobody else holds it
        # unless the function called locals(): the references are the frame's, ours and that of the call.
        if isinstance(values, dict) and code.co_flags & 1 and sys.getrefcount(values) <= 3:
            values.clear()
        frame = frame.f_back
