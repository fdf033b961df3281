"""Batches and outputs: any nest of tensors, and how it is handed over, opened and cut into parts."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from localgrad.errors import MethodError, TrainingError


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """``model`` on a batch: a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a nest: of what pytree knows, of mappings of any kind, and of dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


@contextlib.contextmanager
def only_read(features: Any, block: int) -> Iterator[None]:
    """Raise `MethodError` if what runs inside it overwrites the features behind a block, which later blocks read."""
    versions = [(tensor, tensor._version) for tensor in tensors_in(features) if not tensor.is_inference()]
    yield
    if any(tensor._version != version for tensor, version in versions):
        raise MethodError(
            f"the auxiliary network behind block {block} overwrites the features that it reads in place, and the next "
            "block reads them too: build its first layer, or the unit of the model that it copies, with inplace=False, "
            "or cut elsewhere"
        )


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A nest in which every tensor is what ``function`` makes of it; objects of other kinds stay as they are."""

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, Mapping):  # of a kind that pytree does not know
            made = copy.copy(leaf)
            for key in leaf:
                made[key] = map_tensors(function, leaf[key])  # type: ignore[index]
            return made
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            instance: Any = copy.copy(leaf)
            for field in dataclasses.fields(leaf):
                object.__setattr__(instance, field.name, map_tensors(function, getattr(leaf, field.name)))
            return instance
        return leaf

    return function(value) if isinstance(value, Tensor) else tree_map(mapped, value)


def num_samples(values: Any) -> int | None:
    """Samples of a batch, given as a tensor of B rows, a list of B entries, or tuples and mappings of these."""
    if isinstance(values, Tensor):
        return len(values) if values.dim() else None
    if isinstance(values, list):
        return len(values)
    inner = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else ()
    return next((size for value in inner if (size := num_samples(value)) is not None), None)


def parts_of(inputs: Any, targets: Any, parts: int) -> list[tuple[Any, Any, float]]:
    """Micro-batches, each with its share of the batch; fewer than ``parts`` if there are fewer samples."""
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs  # of a model with several, not one for each sample
    size, wanted = num_samples(inputs), num_samples(targets)
    if wanted is not None and wanted != size:
        raise TrainingError(
            f"{size} samples in inputs and {wanted} in targets; give one target for each sample, or None as targets if "
            "the task's loss reads none"
        )
    if parts == 1 or not size:
        return [(inputs, targets, 1.0)]
    parts = min(parts, size)
    edges = [size * k // parts for k in range(parts + 1)]
    return [(rows(inputs, a, b), rows(targets, a, b), (b - a) / size) for a, b in pairwise(edges)]


def rows(values: Any, start: int, stop: int) -> Any:
    """Samples ``start`` to ``stop`` of such a batch, in the same form; what has no samples stays as it is."""
    if start == 0 and stop == num_samples(values):
        return values
    if isinstance(values, list) or (isinstance(values, Tensor) and values.dim()):
        return values[start:stop]
    if isinstance(values, Mapping):
        return {name: rows(value, start, stop) for name, value in values.items()}
    return tuple(rows(value, start, stop) for value in values) if isinstance(values, tuple) else values
