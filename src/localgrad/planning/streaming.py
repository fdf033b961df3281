"""Ways that keep weights, state or activations on the host, and what they move over the link in a step.

Copies overlap computing: a step takes ``max(computing, link) + alone``, where ``link`` are all copies, one direction
after the other as on one stream, and ``alone`` those that nothing hides. What the host computes is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from localgrad.measure.sizes import size
from localgrad.measure.work import Rates


@dataclass(frozen=True)
class Traffic:
    """What a step moves between host and device; times as ratios to plain training.

    Args:
        moved: bytes, both ways.
        link: time of all copies.
        computing: time of the step without them.
        alone: time of copies that nothing hides.
    """

    moved: int
    link: float
    computing: float
    alone: float

    @property
    def time(self) -> float:
        """Of the step."""
        return max(self.computing, self.link) + self.alone

    def hidden_from(self, parts: int) -> int:
        """From how many micro-batches on computing takes longer than the copies, which are those of one step.

        Args:
            parts: in which the step was run.
        """
        return max(1, math.ceil(parts * self.link / self.computing))

    def told(self, name: str, parts: int, rates: Rates) -> str:
        """The same in a sentence."""
        binds = "the link binds" if self.link > self.computing else "computing binds"
        return (
            f"{name} moves {size(self.moved)} a step, {self.link:.2f} of a plain step at {rates.link / 1e9:.3g} GB/s "
            f"beside {self.computing:.2f} of computing: {binds}; copies are hidden from {self.hidden_from(parts)} "
            "micro-batches of this size on."
        )


def traffic(moved: int, alone: int, computing: float, plain: float, rates: Rates) -> Traffic:
    """See `Traffic`; ``moved`` and ``alone`` in bytes, ``computing`` and that of ``plain`` training in seconds."""
    return Traffic(moved, (moved - alone) / rates.link / plain, computing / plain, alone / rates.link / plain)


def exact_ways(
    option: Any, trained: int, weights: int, unit: int, waiting: int
) -> Iterator[tuple[str, dict[str, Any], int, int]]:
    """What others move to the host while gradients stay exact, without micro-batches.

    Args:
        option: plain training, or checkpointing.
        trained, weights: bytes of the parameters that train, and of all.
        unit: bytes of the largest unit.
        waiting: bytes of the features between checkpointed blocks.

    Yields:
        what to add to the name; bytes by kind that differ; bytes moved, and those of them that nothing hides.

    Source: the optimizer on the host is that of ZeRO-Offload (Ren et al., ATC 2021, arXiv:2101.06840): gradients go
    out in the backward pass, weights come back. FSDP2 with ``CPUOffloadPolicy`` gathers one unit ahead, in the forward
    and again in the backward pass, and moves its gradients out.
    """
    yield ", optimizer on the host", {"optimizer": 0}, 2 * trained, trained
    streamed = {"optimizer": 0, "weights": 2 * unit, "gradients": unit}
    yield ", FSDP2 offload", streamed, 2 * weights + trained, unit
    if waiting:
        fewer = {"activations": option.activations - waiting}
        yield ", checkpoints on the host", fewer, 2 * waiting, 0
