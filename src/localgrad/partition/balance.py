"""Choosing among cut points: by count, or by measured activation bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from localgrad.bench.memory import saved_storages
from localgrad.errors import PartitionError
from localgrad.partition.blocks import INPUTS, Block
from localgrad.partition.cuts import Cut, Partition
from localgrad.partition.trace import untouched

Stem = Literal["unit", "own", "merged"]
Held = Literal["none", "own", "earlier"]


def by_count(partition: Partition, num_blocks: int, stem: Stem = "unit") -> tuple[Cut, ...]:
    """Cut into ``num_blocks`` blocks of equally many units; earlier blocks get what is left over.

    A unit lies between two neighbouring cut points. The classifier behind the last features with positions joins the
    last unit unless as many blocks as possible are asked for.

    Args:
        stem: what runs before the first cut point counts as a ``unit`` of its own (as InfoPro and DGL count), is always
            its ``own`` block (as MAN++ does on CIFAR), or is ``merged`` into the first unit (as MAN does).

    Raises:
        PartitionError: for more blocks than cut points allow, or fewer than 1.
    """
    name = type(partition.model).__name__
    found = len(partition.cuts)
    if num_blocks < 1 or num_blocks > found + 1:
        raise PartitionError(
            f"num_blocks={num_blocks}, but this {name} has {found} cut points; use 1 to {found + 1} blocks or pass "
            f"cuts=(...){partition.kept_whole}"
        )
    if stem == "own" and num_blocks < 2:
        raise PartitionError("num_blocks=1 with stem='own': the stem and the rest are two blocks; use num_blocks=2")
    body = [cut for cut in partition.cuts if not cut.tail]
    units = body if stem in ("own", "merged") else [None, *body]
    wanted = num_blocks - 1 if stem == "own" else num_blocks
    if wanted > len(units):
        units = list(partition.cuts) if stem in ("own", "merged") else [None, *partition.cuts]
    if wanted > len(units):
        raise PartitionError(
            f"num_blocks={num_blocks} with stem={stem!r}: this {name} has {len(units)} units besides the stem; use "
            f"at most {len(units) + (stem == 'own')} blocks, or stem='unit'"
        )
    size, extra = divmod(len(units), wanted)
    starts = [k * size + min(k, extra) for k in range(wanted)]
    chosen = [units[start] for start in starts]
    if stem == "merged":
        chosen[0] = None
    return tuple(cut for cut in chosen if cut is not None)


class AuxiliaryBytes(NamedTuple):
    """What an auxiliary network adds to its block: bytes saved for its backward pass, and of its gradients."""

    saved: int
    gradients: int


def by_bytes(
    partition: Partition,
    num_blocks: int,
    auxiliary: Callable[[Cut], AuxiliaryBytes] | None = None,
    saved: Sequence[dict[int, int]] | None = None,
    *,
    gradients: Held = "none",
    share: float = 1.0,
) -> tuple[Cut, ...]:
    """Cut so that the fullest moment of any block's backward pass is smallest.

    A block begins its backward pass with all that autograd saved for its units and its auxiliary network; a tensor that
    two units save counts once, parameters do not. It goes back unit by unit: what a unit saved is freed, the gradients
    of its parameters appear and stay.

    Args:
        auxiliary: what a method puts on a cut point; None for nothing.
        saved: what `unit_storages` returned, if it is known already.
        gradients: which stay beside the activations: ``none`` counts activations only, ``own`` is for an optimizer that
            steps each block as soon as it is done (and makes one copy of its gradients meanwhile), ``earlier`` for one
            that steps at the end, so that those of the blocks before are alive too (of their units; their auxiliary
            networks are left out).
        share: the example's part of a training batch; gradients do not grow with the batch, activations do.

    Raises:
        PartitionError: for more blocks than cut points allow, or fewer than 1.
    """
    cuts = partition.cuts
    if num_blocks < 1 or num_blocks > len(cuts) + 1:
        raise PartitionError(
            f"num_blocks={num_blocks}, but this {type(partition.model).__name__} has {len(cuts)} cut points; use 1 to "
            f"{len(cuts) + 1} blocks or pass cuts=(...){partition.kept_whole}"
        )
    saved = unit_storages(partition) if saved is None else saved
    none = AuxiliaryBytes(0, 0)
    ends = [*(auxiliary(cut) if auxiliary else none for cut in cuts), none]
    n = len(saved)
    trained = [0] * n
    if gradients != "none":
        units = ([p for p in unit.parameters() if p.requires_grad] for unit in partition.units)
        trained = [int(share * sum(p.numel() * p.element_size() for p in unit)) for unit in units]
        ends = [AuxiliaryBytes(end.saved, int(end.gradients * share)) for end in ends]
    else:
        ends = [AuxiliaryBytes(end.saved, 0) for end in ends]
    cost = [[0] * (n + 1) for _ in range(n)]
    for i in range(n):
        before = sum(trained[:i]) if gradients == "earlier" else 0
        union: dict[int, int] = {}
        moments: list[int] = []  # what the units so far saved, and the gradients of those that are done
        for j in range(i + 1, n + 1):
            union |= saved[j - 1]
            total = sum(union.values())
            moments = [moment + trained[j - 1] for moment in (*moments, total)]
            end = ends[j - 1]
            cost[i][j] = before + max(total + end.saved, max(moments) + end.gradients)
            if gradients == "own":
                cost[i][j] = max(cost[i][j], 2 * (sum(trained[i:j]) + end.gradients))
    return tuple(cuts[start - 1] for start in _smallest_largest(cost, num_blocks) if start > 0)


def _smallest_largest(cost: Sequence[Sequence[int]], num_blocks: int) -> list[int]:
    """Where ``num_blocks`` runs of units begin whose largest ``cost[start][stop]`` is smallest.

    Dynamic programming over how many units the first k runs cover; among equal maxima the smaller sum of squares wins,
    so that the other runs stay even.
    """
    n = len(cost)
    best: list[list[tuple[int, int]]] = [[(0, 0)] + [(1 << 62, 0)] * n]
    choice: list[list[int]] = [[0] * (n + 1)]
    for k in range(1, num_blocks + 1):
        row, picks = [(1 << 62, 0)] * (n + 1), [0] * (n + 1)
        for j in range(k, n + 1):
            options = (
                (max(best[k - 1][i][0], cost[i][j]), best[k - 1][i][1] + cost[i][j] ** 2, i) for i in range(k - 1, j)
            )
            largest, squares, picks[j] = min(options)
            row[j] = (largest, squares)
        best.append(row)
        choice.append(picks)
    starts, end = [], n
    for k in range(num_blocks, 0, -1):
        end = choice[k][end]
        starts.append(end)
    return sorted(starts)


def unit_storages(partition: Partition) -> list[dict[int, int]]:
    """For each unit, the storages autograd saves for its backward pass on the example: id -> bytes."""
    model = partition.model
    exclude = [*model.parameters(), *model.buffers()]
    inputs = partition.example
    exclude += [inputs] if isinstance(inputs, Tensor) else list(inputs)
    units = partition.units
    try:
        with untouched(model, training=True):
            return _run_units(units, inputs, exclude)
    except ValueError as error:  # BatchNorm refuses a single value per channel
        raise PartitionError(
            f"balance='bytes' runs the example in training mode, which fails: {error}. Pass an example of at least "
            "2 samples."
        ) from error


def _run_units(units: Sequence[Block], inputs: Any, exclude: Sequence[Tensor]) -> list[dict[int, int]]:
    values: dict[str, Any] = {INPUTS: inputs}
    kept, saved = [], []  # kept: storage ids are unique only while every storage is alive
    for unit in units:
        arguments = [values[name] for name in unit.inputs]
        outputs, storages = saved_storages(partial(unit, *arguments), exclude)
        kept.append(outputs)
        values |= zip(unit.outputs, outputs, strict=True)
        saved.append(storages)
    return saved


def module_bytes(module: nn.Module, features: Tensor) -> int:
    """Bytes autograd saves when ``module`` runs on ``features``, parameters, buffers and the features left out."""
    leaf = features.detach().requires_grad_()
    _, storages = saved_storages(lambda: module(leaf), [*module.parameters(), *module.buffers(), leaf])
    return sum(storages.values())
