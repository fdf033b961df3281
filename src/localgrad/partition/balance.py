"""Choosing among cut points: by count, or by measured activation bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from localgrad.bench.memory import saved_storages
from localgrad.errors import PartitionError
from localgrad.partition.blocks import INPUTS, Block
from localgrad.partition.cuts import Cut, Partition
from localgrad.partition.trace import untouched

Stem = Literal["unit", "own", "merged"]


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


def by_bytes(
    partition: Partition,
    num_blocks: int,
    auxiliary_bytes: Callable[[Cut], int] | None = None,
    saved: Sequence[dict[int, int]] | None = None,
) -> tuple[Cut, ...]:
    """Cut so that the largest block's activation bytes are smallest.

    A block's bytes are those autograd saves for its units on the example, parameters left out and a tensor that two
    units save counted once, and ``auxiliary_bytes`` of the boundary it ends at. ``saved`` is what `unit_storages`
    returned, if it is known already.

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
    heads = [auxiliary_bytes(cut) if auxiliary_bytes else 0 for cut in cuts] + [0]
    n = len(saved)
    cost = [[0] * (n + 1) for _ in range(n)]
    for i in range(n):
        union: dict[int, int] = {}
        for j in range(i + 1, n + 1):
            union |= saved[j - 1]
            cost[i][j] = sum(union.values()) + heads[j - 1]
    # Minimise the maximum by dynamic programming: best[k][j] covers units 0 .. j-1 with k blocks; among equal maxima
    # the smaller sum of squares wins, so that the other blocks stay even.
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
    return tuple(cuts[start - 1] for start in sorted(starts) if start > 0)


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
