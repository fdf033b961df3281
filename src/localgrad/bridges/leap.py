"""The bridge of MLAAN: a few of the model's later units, leaping ahead to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

from torch import nn

from localgrad.bridges.momentum import Momentum, MomentumBridge
from localgrad.errors import MethodError, nearest
from localgrad.partition import Unit
from localgrad.recompute.parts import Parts
from localgrad.site import Site

Twins = Literal["first", "all"]
Where = Literal["cascade", "independent", "both"]

# Units per stage -> number of blocks -> the last block a chain serves: its units as stage.index, the papers' way to
# count (stages from 1, units from 0, the stem apart). Source: MLAAN, released leap tables.
_R110_EARLY, _R110_MIDDLE = "2.0 3.0 3.2 3.17", "3.0 3.2 3.3 3.17"
_PUBLISHED: dict[tuple[int, ...], dict[int, dict[int, str]]] = {
    (5, 5, 5): {
        8: {
            1: "2.0 3.0 3.2 3.4", 2: "2.0 3.0 3.3 3.4", 4: "3.0 3.2 3.3 3.4", 5: "3.2 3.3 3.4", 6: "3.3 3.4",
        },
        15: {
            1: "2.0 3.0 3.2 3.4", 2: "2.0 3.0 3.3 3.4", 3: "2.0 3.0 3.2 3.4", 4: "2.0 3.0 3.3 3.4",
            9: "3.0 3.2 3.3 3.4", 10: "3.1 3.2 3.4", 11: "3.2 3.3 3.4", 12: "3.3 3.4", 13: "3.4",
        },
    },
    (18, 18, 18): {
        32: {
            10: _R110_EARLY, 20: _R110_MIDDLE, 21: "3.0 3.3 3.4 3.17", 25: "3.8 3.17", 27: "3.14 3.17", 28: "3.15 3.17",
            29: "3.16 3.17", 30: "3.17",
        },
        54: {
            17: _R110_EARLY, 34: _R110_MIDDLE, 35: "3.0 3.3 3.4 3.17", 42: "3.8 3.17", 46: "3.14 3.17", 48: "3.15 3.17",
            51: "3.16 3.17", 52: "3.17",
        },
    },
    (3, 4, 6, 3): {
        16: {2: "2.0 2.1 3.0 4.0 4.2", 6: "2.1 3.0 4.0 4.2", 12: "3.1 4.0 4.1", 13: "4.1 4.1 4.2", 14: "4.1 4.2"},
    },
    (3, 4, 23, 3): {33: {2: "2.0 3.0 4.0 4.2", 6: "3.0 4.0 4.1", 29: "4.0 4.1", 31: "4.1 4.2"}},
}  # fmt: skip


@dataclass(frozen=True)
class Leap:
    """Learnable copies of later units, one behind the other; twins of them run beside and are added.

    The chain is the published one where there is one for this network, number of blocks and boundary. Otherwise: every
    later unit that changes width or resolution, since the others would not fit without them, then of the units after
    the last of those the middle one and the last one. Nothing is built where no later unit can be copied
    (`localgrad.site.Site.next_units`).

    Args:
        decay: of the moving average.
        twins: ``first`` gives only the first unit of the chain a twin, ``all`` each of them.
        where: build it for spans of several blocks (``cascade``), of one block (``independent``), or ``both``.
        released: as the released code: twins move before the optimizer step, and only the one at the last boundary.
        learnable: twins are trained by the loss as well.

    Source: MLAAN, AAAI 2025, arXiv:2406.16633, released leap tables; the rule behind them is our reading.
    """

    decay: float = 0.995
    twins: Twins = "first"
    where: Where = "cascade"
    released: bool = False
    learnable: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise MethodError(f"decay={self.decay}; a moving average needs a decay between 0 and 1")
        for name, value, known in (("twins", self.twins, Twins), ("leap", self.where, Where)):
            if value not in get_args(known):
                raise MethodError(nearest(value, get_args(known), name))

    def __call__(self, site: Site) -> nn.Module | None:
        cascade = site.span.stop - site.span.start > 1
        if self.where == ("independent" if cascade else "cascade"):
            return None
        units = [unit.module for unit in published_chain(site) or chain_of(site.next_units)]
        if not units:
            return None
        settings = Momentum(self.decay, "sum", companion_init="source")
        if self.released:
            last = site.span.stop == site.num_blocks - 1
            settings = replace(settings, decay=self.decay if last else 1.0, exchange="before")
        together = [units] if self.twins == "first" else [[unit] for unit in units]
        made = [MomentumBridge(some, settings) for some in together]
        for bridge in made:
            assert bridge.twin is not None
            bridge.twin.requires_grad_(self.learnable)
        return made[0] if len(made) == 1 else Parts(*made)


def chain_of(units: Sequence[Unit]) -> list[Unit]:
    """The general rule, see `Leap`."""
    changing = [k for k, unit in enumerate(units) if unit.changes_form]
    rest = list(units[changing[-1] + 1 if changing else 0 :])
    middle = [rest[(len(rest) - 1) // 2]] if len(rest) > 1 else []
    return [units[k] for k in changing] + middle + rest[-1:]


def published_chain(site: Site) -> list[Unit] | None:
    """The chain of the released tables for this boundary, None if they have none that fits."""
    stages: list[list[Unit]] = [[]]
    for unit in site.partition.units_after(site.partition.cuts[0]):
        if unit.changes_form and stages[-1]:
            stages.append([])
        stages[-1].append(unit)
    tables = _PUBLISHED.get(tuple(map(len, stages)), {})
    stem_alone = site.num_blocks not in tables  # the tables count the stem into the first block
    rows = tables.get(site.num_blocks - stem_alone, {})
    block = max(0, site.span.stop - 1 - stem_alone)
    names = next((row for last, row in sorted(rows.items()) if block <= last), "")
    chain = [stages[int(s) - 1][int(i)] for s, i in (name.split(".") for name in names.split())]
    fits = chain and chain[0].reads == site.layout and all(a.returns == b.reads for a, b in pairwise(chain))
    return chain if fits else None
