"""Batches and outputs: any nest of tensors, and how it is handed over, opened and cut into parts."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping
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
    return _found(value)


def _found(value: Any, whole: Callable[[Any], bool] | None = None) -> list[Any]:
    """What `map_tensors` calls its function with, in order."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Any] = []

    def note(part: Any) -> Any:
        found.append(part)
        return part

    map_tensors(note, value, whole)
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


def map_tensors(function: Callable[[Any], Any], value: Any, whole: Callable[[Any], bool] | None = None) -> Any:
    """A nest in which every tensor is what ``function`` makes of it; objects of other kinds stay as they are.

    So is what ``whole`` says of, a list say, instead of the tensors in it.
    """

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) or (whole is not None and whole(leaf)):
            return function(leaf)
        if isinstance(leaf, Mapping):  # of a kind that pytree does not know
            made = copy.copy(leaf) if isinstance(leaf, MutableMapping) else dict(leaf)
            for key in leaf:
                made[key] = map_tensors(function, leaf[key], whole)
            return made
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            instance: Any = copy.copy(leaf)
            for field in dataclasses.fields(leaf):
                object.__setattr__(instance, field.name, map_tensors(function, getattr(leaf, field.name), whole))
            return instance
        return leaf

    return function(value) if isinstance(value, Tensor) else tree_map(mapped, value, is_leaf=whole)


def num_samples(values: Any) -> int | None:
    """Samples of a batch: the rows of its first tensor with rows, or the entries of its first list, in any nest."""
    return next((len(part) for part in _rowed(values)), None)


def _rowed(values: Any) -> list[Any]:
    """The tensors that have rows, and the lists, of a batch."""
    return [part for part in _found(values, _is_list) if _is_list(part) or part.dim()]


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def positional(inputs: Any) -> Any:
    """Inputs of a model that takes several, given as a list: no list of one entry for each sample."""
    return tuple(inputs) if isinstance(inputs, list) else inputs


def parts_of(inputs: Any, targets: Any, parts: int, example: Any) -> list[tuple[Any, Any, float]]:
    """Micro-batches, each with its share of the batch; fewer than ``parts`` if there are fewer samples.

    What has a row for each sample is cut, see `rows`; everything else goes to every part whole. A mask (T, T) in a
    batch of T samples looks as if it had. So an input whose rows were not the samples of ``example``, which the network
    was cut with, stays whole too. Where both have T samples, (T, T) is cut, and a mask is to be given as (1, T, T).
    """
    inputs = positional(inputs)
    size, wanted = num_samples(inputs), num_samples(targets)
    if wanted is not None and wanted != size:
        raise TrainingError(
            f"{size or 'no'} samples in inputs and {wanted} in targets; give one target for each sample, or None as "
            "targets if the task's loss reads none"
        )
    if parts == 1 or not size:
        return [(inputs, targets, 1.0)]
    parts = min(parts, size)
    edges = [size * k // parts for k in range(parts + 1)]
    shared = _shared(inputs, positional(example))
    return [(rows(inputs, a, b, shared), rows(targets, a, b), (b - a) / size) for a, b in pairwise(edges)]


def _shared(inputs: Any, example: Any) -> set[int]:
    """Identities of the inputs that all samples share, as those of ``example`` in the same places did."""
    samples, before = num_samples(example), _arguments(example)
    pairs = [(_rowed(value), _rowed(before[name])) for name, value in _arguments(inputs).items() if name in before]
    alike = [zip(now, then, strict=True) for now, then in pairs if len(now) == len(then)]
    return {id(now) for places in alike for now, then in places if len(then) != samples}


def _arguments(inputs: Any) -> dict[Any, Any]:
    """By position or name."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return dict(enumerate(inputs if isinstance(inputs, tuple) else (inputs,)))


def rows(values: Any, start: int, stop: int, shared: Container[int] = ()) -> Any:
    """Samples ``start`` to ``stop`` of such a batch, in the same form and of the same kinds.

    Of B samples, tensors of B rows and lists of B entries are cut, but for those whose identity is in ``shared``. What
    else there is, such as position ids (1, T), numbers and objects that are not opened, stays whole.
    """
    samples = num_samples(values)
    if start == 0 and stop == samples:
        return values

    def cut(part: Any) -> Any:
        has = _is_list(part) or part.dim() > 0
        return part[start:stop] if has and len(part) == samples and id(part) not in shared else part

    return map_tensors(cut, values, lambda part: _is_list(part) and len(part) == samples)
