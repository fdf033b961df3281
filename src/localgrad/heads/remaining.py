"""The head of AugLocal: a small network that looks like the rest of the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from localgrad.bridges.copies import copied
from localgrad.errors import MethodError
from localgrad.heads.linear import Linear
from localgrad.partition import Unit
from localgrad.recompute.parts import Parts
from localgrad.site import HeadBuilder, Site


@dataclass(frozen=True)
class Remaining:
    """Units built like ``depth`` of those that follow, evenly spread up to the last one, then a read-out.

    ``offsets = round(l + n / d * i) - l`` for i = 1 .. d, with l units before the boundary's last and n after it. The
    weights are the head's own. Towards the output of the model heads become shallower, the pyramid:
    ``d = max(1, round(depth * (1 - pyramid * t) + pyramid * t))``, t from 0 at the first boundary to 1 at the last.

    Where no later unit can be copied (`localgrad.site.Site.next_units`) the read-out stands alone.

    Args:
        read_out: builds what stands behind the units, a linear layer in the paper.
        depth: units at the first boundary.
        pyramid: how much of ``depth`` is gone at the last boundary; 0 keeps it everywhere.
        tail: blocks trained together at the end of the model; they have no heads.
        exact: refuse a pick that skips a stage, where the head differs from the released one.

    Source: Ma et al., AugLocal, ICLR 2024, arXiv:2402.17318, released code.
    Differs: where a picked unit lies in a later stage, the unit that begins that stage stands for it, because it has
    the right width and stride; theirs builds a unit anew, and skips a stage in one unit where the pick does. In the
    published CIFAR networks only ``depth=1`` skips one.
    """

    read_out: HeadBuilder
    depth: int = 2
    pyramid: float = 0.5
    tail: int = 3
    exact: bool = False

    def __post_init__(self) -> None:
        if self.depth < 1 or self.tail < 1 or not 0.0 <= self.pyramid <= 1.0:
            raise MethodError(
                f"depth={self.depth}, tail={self.tail}, pyramid={self.pyramid}; need depth and tail of at least 1 and "
                "a pyramid between 0 and 1"
            )

    def depth_at(self, site: Site) -> int:
        """Units of the head at one site."""
        heads = site.num_blocks - self.tail
        share = (site.span.stop - 1) / (heads - 1) if heads > 1 else 0.0
        return max(1, round(self.depth * (1 - self.pyramid * share) + self.pyramid * share))

    def __call__(self, site: Site) -> nn.Module:
        depth, units = self.depth_at(site), site.next_units
        chain = picked(units, depth, site.units_passed - 1)
        if self.exact and len(chain) > min(depth, len(units)):
            raise MethodError(
                f"released=True: a head of depth={depth} after block {site.span.stop - 1} skips a stage, which the "
                "release does in one unit that this model does not have; take a larger depth, or released=False"
            )
        body = Parts(*(copied(unit.module, "fresh") for unit in chain))
        beyond = site.beyond(body)
        head = self.read_out(beyond)
        read_out = list(head) if isinstance(head, nn.Sequential) else [head]
        if depth == 1 and isinstance(self.read_out, Linear):
            read_out.insert(-1, nn.BatchNorm1d(beyond.channels))
        return nn.Sequential(body, *read_out).train()


def picked(units: tuple[Unit, ...], depth: int, passed: int) -> list[Unit]:
    """The units that a head of ``depth`` is built like; ``passed`` units lie before the one the boundary follows."""
    offsets = sorted({max(1, round(passed + len(units) / depth * i) - passed) for i in range(1, depth + 1)})
    chain: list[Unit] = []
    done = 0
    for offset in offsets if units else ():
        between = units[done:offset]
        changing = [unit for unit in between if unit.changes_form]
        chain += changing or [between[-1]]
        done = offset
    return chain
