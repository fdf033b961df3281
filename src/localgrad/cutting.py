"""Choosing where to cut, as a value; `localgrad.cuts` shows what may be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from localgrad.batches import num_samples, positional, tensors_in
from localgrad.errors import PartitionError, nearest
from localgrad.method import Auxiliary, Method
from localgrad.partition import AuxiliaryBytes, Chain, Cut, Partition, choose
from localgrad.partition.choose import Stem, features_at, module_bytes
from localgrad.site import Site
from localgrad.spans import Span


class Chosen(NamedTuple):
    """What a cutting came to: the analysed model, cut points, and the blocks whose units are run again."""

    partition: Partition
    cuts: tuple[Cut, ...]
    recompute: tuple[int, ...] = ()


@runtime_checkable
class Cutting(Protocol):
    """A way to choose cut points."""

    def choose(self, model: nn.Module, method: Method, example: Any, shared: bool) -> Chosen:
        """The cut points for a model that a method trains."""


@dataclass(frozen=True)
class by_count:
    """Equally many units in each block; a unit lies between neighbouring cut points.

    Args:
        num_blocks: K.
        stem: what runs before the first cut point: a ``unit``, its ``own`` block, or ``merged`` with the first unit.
    """

    num_blocks: int
    stem: Stem = "unit"

    def __post_init__(self) -> None:
        _check_count(self.num_blocks)
        if self.stem not in get_args(Stem):
            raise PartitionError(nearest(str(self.stem), get_args(Stem), "stem"))

    def choose(self, model: nn.Module, method: Method, example: Any, shared: bool) -> Chosen:
        """See `Cutting`."""
        partition = Partition(model, example, shared)
        return Chosen(partition, choose.by_count(partition, self.num_blocks, self.stem))


@dataclass(frozen=True)
class by_bytes:
    """The smallest memory of the fullest block: activations, head and bridge.

    Args:
        num_blocks: K.
        batch_size: images in a training step, which counts gradients too: they do not grow with the batch; None counts
            activations only.
    """

    num_blocks: int
    batch_size: int | None = None

    def __post_init__(self) -> None:
        _check_count(self.num_blocks)
        check_batch_size(self.batch_size)

    def choose(self, model: nn.Module, method: Method, example: Any, shared: bool) -> Chosen:
        """See `Cutting`."""
        partition = Partition(model, example, shared)
        samples = num_samples(positional(example)) or 1
        chosen = choose.by_bytes(
            partition,
            self.num_blocks,
            auxiliary_bytes(method, partition, self.num_blocks),
            gradients="earlier" if method.terms and self.batch_size is not None else "none",
            share=samples / (self.batch_size or samples),
        )
        return Chosen(partition, chosen)


@dataclass(frozen=True)
class recomputed:
    """As another cutting; the units of some blocks, but each one's last, run again in the backward pass.

    What one unit saves is then alive at a time. Needs blocks that can be called one by one, see
    `localgrad.partition.separate`.

    Args:
        cutting: any other.
        blocks: indices from 0.
    """

    cutting: Any
    blocks: tuple[int, ...]

    def choose(self, model: nn.Module, method: Method, example: Any, shared: bool) -> Chosen:
        """See `Cutting`."""
        chosen = as_cutting(self.cutting).choose(model, method, example, shared)
        return chosen._replace(recompute=tuple(dict.fromkeys((*chosen.recompute, *self.blocks))))


@dataclass(frozen=True)
class _Named:
    """Before the modules of these names."""

    names: tuple[str, ...]

    def choose(self, model: nn.Module, method: Method, example: Any, shared: bool) -> Chosen:
        partition = Partition(model, example, shared)
        return Chosen(partition, partition.named(self.names))


@dataclass(frozen=True, eq=False)
class _Modules:
    """Between modules that run one after the other."""

    modules: tuple[nn.Module, ...]

    def choose(self, model: nn.Module, method: Method, example: Any, shared: bool) -> Chosen:
        chain = Chain(self.modules)
        chain.check_equals(model, example)
        partition = Partition(chain, example, shared)
        return Chosen(partition, partition.named([f"steps.{k}" for k in range(1, len(self.modules))]))


def auxiliary_bytes(method: Method, partition: Partition, num_blocks: int) -> Callable[[Cut], AuxiliaryBytes]:
    """What the auxiliary network that ``method`` would put on a cut point saves, and its gradients."""
    features: dict[Cut, Tensor] = {}
    inputs = tensors_in(partition.example)[0]

    def measured(cut: Cut) -> AuxiliaryBytes:
        if all(span.stop == num_blocks for span in method.spans(num_blocks, 0)):
            return AuxiliaryBytes(0, 0)
        if cut not in features:
            cuts = partition.cuts if cut in partition.cuts else partition.finest
            features.update(zip(cuts, features_at(partition, cuts), strict=True))
        # As behind the first block, where auxiliary networks are largest. Where the others are much smaller, counting
        # them as they are would leave the first block next to nothing to train (docs/lean.md, "Few blocks").
        site = Site(Span(0, 1), 3, features[cut], inputs, cut, partition)
        with torch.random.fork_rng():
            auxiliary = Auxiliary(method, site)
        trained = sum(p.numel() * p.element_size() for p in auxiliary.parameters() if p.requires_grad)
        return AuxiliaryBytes(module_bytes(auxiliary, features[cut]), trained)

    return measured


def as_cutting(value: Any) -> Cutting:
    """What was written as a `Cutting`.

    Raises:
        PartitionError: it is none; the message says what may be written.
    """
    if isinstance(value, (int, float)):
        return by_count(value)  # type: ignore[arg-type]
    if isinstance(value, str):
        raise PartitionError(f"cutting={value!r} is one string; write a tuple of module names, ({value!r},)")
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(entry, str) for entry in value):
            return _Named(tuple(value))
        if all(isinstance(entry, nn.Module) for entry in value):
            return _Modules(tuple(value))
    if isinstance(value, Cutting):
        return value
    raise PartitionError(
        f"cutting={value!r} does not say where to cut; write a number of blocks, 4, names of modules that blocks begin "
        "with, ('layer2', 'layer3'), a list of modules, or one of localgrad.cuts such as cuts.by_bytes(8)"
    )


def _check_count(num_blocks: Any) -> None:
    if type(num_blocks) is not int:
        raise PartitionError(
            f"num_blocks={num_blocks!r} is a {type(num_blocks).__name__}; write a whole number, such as 4"
        )


def check_batch_size(batch_size: int | None) -> None:
    """Raise `PartitionError` unless it is None or positive."""
    if batch_size is not None and batch_size < 1:
        raise PartitionError(f"batch_size={batch_size}: it says for how many images, at least 1, memory is counted")
