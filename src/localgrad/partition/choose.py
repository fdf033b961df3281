"""Choosing among cut points: by count, or by measured activation bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from localgrad.batches import tensors_in
from localgrad.errors import PartitionError
from localgrad.forward import SuspendedForward
from localgrad.measure.memory import saved_storages
from localgrad.opened import OpenModel
from localgrad.partition.cut import Cut
from localgrad.partition.moments import Partition
from localgrad.suspension.points import Watch
from localgrad.suspension.untouched import untouched

Stem = Literal["unit", "own", "merged"]
Held = Literal["none", "own", "earlier"]


def _available(partition: Partition, num_blocks: int) -> tuple[Cut, ...]:
    """The default cut points, or the finest where there are too few of them.

    Raises:
        PartitionError: for more blocks than cut points allow, or fewer than 1.
    """
    cuts = partition.cuts if num_blocks <= len(partition.cuts) + 1 else partition.finest
    if not 1 <= num_blocks <= len(cuts) + 1:
        count = len(partition.finest)
        tied = next((name for cut, _ in partition.all for name in cut.shared), None)
        ways = f"use 1 to {count + 1} blocks" if count else "it stays one block"
        if named := tuple(cut.name for cut in partition.finest or [cut for cut, _ in partition.all])[:2]:
            ways += f" or name modules that blocks begin with, {named}"
        if not cuts and tied is not None and not partition.shared:
            ways += f". {tied!r} is used at both ends; localize(..., shared=True) lets both train it"
        raise PartitionError(
            f"{num_blocks} blocks, but this {type(partition.model).__name__} has {count or 'no'} cut points; {ways}"
        )
    return cuts


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
    cuts = _available(partition, num_blocks)
    if stem == "own" and num_blocks < 2:
        raise PartitionError(
            "1 block with stem='own': the stem and the rest are two blocks; write by_count(2, stem='own')"
        )
    first = [None] if stem == "unit" else []
    units = [*first, *(cut for cut in cuts if not cut.tail)]
    wanted = num_blocks - 1 if stem == "own" else num_blocks
    if wanted > len(units):
        units = [*first, *cuts]
    if wanted > len(units):
        raise PartitionError(
            f"{num_blocks} blocks with stem={stem!r}: this {type(partition.model).__name__} has {len(units)} units "
            f"besides the stem; use at most {len(units) + (stem == 'own')} blocks, or stem='unit'"
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
    if _available(partition, num_blocks) is not cuts:
        cuts, saved = partition.finest, None
    saved = unit_storages(partition, cuts) if saved is None else saved
    none = AuxiliaryBytes(0, 0)
    ends = [*(auxiliary(cut) if auxiliary else none for cut in cuts), none]
    n = len(saved)
    counted = 0.0 if gradients == "none" else share
    trained = [int(counted * size) for size in _trained_bytes(partition, cuts)]
    ends = [AuxiliaryBytes(end.saved, int(counted * end.gradients)) for end in ends]
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
    # For each number of units covered: the largest cost, the sum of squares, and where the runs begin, the last first.
    best: list[tuple[int, int, tuple[int, ...]]] = [(row, row**2, (0,)) for row in cost[0]]
    for k in range(1, num_blocks):
        covered = best.copy()
        for stop in range(k + 1, n + 1):
            best[stop] = min(
                (max(covered[i][0], cost[i][stop]), covered[i][1] + cost[i][stop] ** 2, (i, *covered[i][2]))
                for i in range(k, stop)
            )
    return sorted(best[n][2])


def _trained_bytes(partition: Partition, cuts: Sequence[Cut]) -> list[int]:
    """Bytes of the parameters that each unit trains; a shared one counts where it is used last."""
    home, sizes = partition.home(cuts), [0] * (len(cuts) + 1)
    for name, parameter in partition.model.named_parameters():
        if parameter.requires_grad and home[name]:
            sizes[home[name][-1]] += parameter.numel() * parameter.element_size()
    return sizes


@contextlib.contextmanager
def _suspended(partition: Partition, cuts: Sequence[Cut]) -> Iterator[SuspendedForward]:
    """A forward in training mode that has not begun and halts at each of ``cuts``."""
    model = partition.model
    device, points = next(model.parameters()).device.type, [cut.point for cut in cuts]
    with untouched(model, training=True), OpenModel(model, model, points, Watch(), device) as opened:
        yield opened.call(partition.example)


@torch.enable_grad()
def unit_storages(partition: Partition, cuts: Sequence[Cut] | None = None) -> list[dict[int, int]]:
    """For each unit, the storages autograd saves for its backward pass on the example: id -> bytes.

    The model runs once, suspended at every cut point; nothing is cut from its graph.
    """
    model, cuts = partition.model, partition.cuts if cuts is None else cuts
    exclude = [*model.parameters(), *model.buffers(), *tensors_in(partition.example)]
    kept, saved = [], []  # kept: storage ids are unique only while every storage is alive
    with _suspended(partition, cuts) as forward:
        while forward.boundary <= len(cuts):
            before = forward.boundary
            _, storages = saved_storages(forward.proceed, exclude)
            kept.append(forward.features)
            saved += [*({} for _ in range(forward.boundary - before - 1)), storages]
    return saved


@torch.no_grad()
def features_at(partition: Partition, cuts: Sequence[Cut]) -> list[Tensor]:
    """The features of the example at each of ``cuts``, in training mode."""
    found = []
    with _suspended(partition, cuts) as forward:
        for _ in cuts:
            forward.proceed()
            found.append(forward.features)
    return found


def module_bytes(module: nn.Module, features: Tensor) -> int:
    """Bytes autograd saves when ``module`` runs on ``features``, parameters, buffers and the features left out."""
    leaf = features.detach().requires_grad_()
    _, storages = saved_storages(lambda: module(leaf), [*module.parameters(), *module.buffers(), leaf])
    return sum(storages.values())
