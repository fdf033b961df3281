"""Values of any structure as messages: what they consist of in JSON, and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from localgrad.distributed.compression import Wire, compressed, restored
from localgrad.errors import TrainingError


def encoded(value: Any, tensors: list[Tensor], name: str, wire: Wire = "same") -> dict[str, Any]:
    """A tree of tensors, numbers and sizes as JSON that names places in ``tensors``, to which its own are added.

    ``wire`` says what becomes of tensors, see `compressed`.

    Raises:
        TrainingError: it holds something else.
    """
    leaves, spec = tree_flatten(value)
    found: list[tuple[str, Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            parts = compressed(leaf, wire)
            plain = parts[0].dtype == leaf.dtype
            dtype = str(leaf.dtype).removeprefix("torch.")
            found.append(("tensor", len(tensors)) if plain else ("compressed", [dtype, len(tensors), len(parts)]))
            tensors += parts
        elif isinstance(leaf, torch.Size):
            found.append(("size", list(leaf)))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            found.append(("constant", leaf))
        else:
            raise TrainingError(
                f"{name} holds a {type(leaf).__name__}, which cannot be sent to another rank; only tensors, numbers, "
                "strings and sizes can. Cut the network elsewhere, or pass targets as tensors"
            )
    return {"tree": treespec_dumps(spec), "leaves": found}


def decoded(code: dict[str, Any] | None, tensors: Sequence[Tensor]) -> Any:
    """What was `encoded`; None for None."""
    if code is None:
        return None
    kinds: dict[str, Callable[[Any], Any]] = {
        "tensor": tensors.__getitem__,
        "compressed": lambda c: restored(tuple(tensors[c[1] : c[1] + c[2]]), getattr(torch, c[0])),
        "size": torch.Size,
        "constant": lambda x: x,
    }
    leaves = [kinds[kind](content) for kind, content in code["leaves"]]
    return tree_unflatten(leaves, treespec_loads(code["tree"]))
