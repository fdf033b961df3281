"""How fast a layout would be, from the costs of blocks and the speed of links; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from localgrad.batches import tensors_in
from localgrad.distributed.placement import balanced, clocked
from localgrad.distributed.rows import acts, rank_table
from localgrad.distributed.timeline import Event
from localgrad.errors import ConfigError
from localgrad.network import LocalNetwork
from localgrad.passes import Pass
from localgrad.spans import Local

Schedule = Literal["local", "gpipe", "1f1b", "data"]
STEPS = 24  # simulated; the first half fills the pipeline and is not counted


@dataclass(frozen=True)
class BlockCost:
    """One block and its heads, for a whole batch: seconds and bytes.

    Args:
        forward: of the block.
        rest: of its heads, losses and local backward pass.
        backward: of the block alone, in end-to-end training.
        features: what it sends to the next one, targets included.
        parameters: of the block and its heads, gradients of which replicas average.
    """

    forward: float
    rest: float
    backward: float
    features: int
    parameters: int


@dataclass(frozen=True)
class LinkSpeed:
    """``bytes / bandwidth + latency`` seconds for a message; bandwidth in bytes a second."""

    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or not self.latency >= 0:
            raise ConfigError(
                f"bandwidth={self.bandwidth} bytes/s, latency={self.latency} s; need a positive bandwidth and a "
                "latency of at least 0"
            )


@dataclass(frozen=True)
class Forecast:
    """What a layout would do.

    Args:
        schedule: how blocks are trained.
        ranks: along the blocks, and replicas of each.
        place: the rank of each block.
        seconds: of a step in the steady state.
        samples_per_second: of all replicas.
        bubble: share of the time that an average rank waits.
        bytes_per_step: over the busiest link.
        events: of each rank, for a picture.
    """

    schedule: Schedule
    ranks: tuple[int, int]
    place: tuple[int, ...]
    seconds: float
    samples_per_second: float
    bubble: float
    bytes_per_step: float
    events: tuple[tuple[Event, ...], ...]


class _Ranks:
    """Clocks of ranks and links; work waits for its rank and for what it needs."""

    def __init__(self, count: int, link: LinkSpeed) -> None:
        self.clocks, self.link = [0.0] * count, link
        self.wires: dict[tuple[int, int], float] = {}
        self.events: list[list[Event]] = [[] for _ in range(count)]

    def work(self, rank: int, kind: str, step: int, part: int, after: float, seconds: float) -> float:
        """Begins when the rank is free and not before ``after``; returns its end."""
        start = max(self.clocks[rank], after)
        self.clocks[rank] = start + seconds
        self.events[rank].append(Event(kind, step, part, -1, start, self.clocks[rank]))
        return self.clocks[rank]

    def send(self, source: int, target: int, at: float, size: float) -> float:
        """When ``size`` bytes sent ``at`` arrive; one message at a time takes the bandwidth of a link."""
        start = max(at, self.wires.get((source, target), 0.0))
        self.wires[source, target] = start + size / self.link.bandwidth
        return self.wires[source, target] + self.link.latency


def forecast(
    blocks: Sequence[BlockCost],
    link: LinkSpeed,
    batch_size: int,
    schedule: Schedule,
    *,
    stages: int = 1,
    replicas: int = 1,
    micro_batches: int = 1,
    depth: int = 2,
    place: Sequence[int] | None = None,
) -> Forecast:
    """The steady state of one layout.

    ``local`` is `block_parallel` with a method of single blocks: the rows that a rank executes there are priced here.
    Features are sent before the loss, nothing comes back.
    ``gpipe`` and ``1f1b`` train end to end in ``micro_batches``; features and their gradients have the same size.
    ``data`` has the whole network on each rank. Replicas of any of them average what they train, parameters with their
    gradients' size, after every step in a ring of ``2 (D - 1) / D`` times its bytes, without overlap.

    Args:
        blocks: what they cost on one rank, for a batch of ``batch_size``.
        link: between neighbouring ranks, one each way.
        batch_size: samples of one replica.
        schedule: see above.
        stages: ranks along the blocks.
        replicas: of each.
        micro_batches: of a step, for ``gpipe`` and ``1f1b``.
        depth: batches a rank may be ahead, for ``local``.
        place: the rank of each block; None balances the seconds.

    Raises:
        ConfigError: more stages than blocks.

    Source: GPipe, arXiv:1811.06965; one-forward-one-backward: PipeDream-Flush, arXiv:2006.09503.
    """
    cost = [b.forward + (b.rest if schedule == "local" else b.backward) for b in blocks]
    place = balanced(cost, stages) if place is None else list(place)
    own = [[block for block, rank in zip(blocks, place, strict=True) if rank == r] for r in range(stages)]
    ranks = _Ranks(stages, link)
    run = _local if schedule == "local" else _end_to_end
    ends = []
    for step in range(STEPS):
        run(ranks, own, schedule, step, micro_batches, depth)
        if replicas > 1:
            for rank, blocks_here in enumerate(own):
                size = sum(block.parameters for block in blocks_here)
                ring = 2 * (replicas - 1) / replicas * size / link.bandwidth + 2 * (replicas - 1) * link.latency
                ranks.work(rank, "average", step, 0, 0.0, ring)
        ends.append(list(ranks.clocks))
    half = STEPS // 2
    seconds = max(b - a for a, b in zip(ends[half - 1], ends[-1], strict=True)) / (STEPS - half)
    busy = [sum(e.end - e.start for e in row if e.step >= half and e.kind != "average") for row in ranks.events]
    crossing = [here[-1].features for here in own[:-1]]
    wire = max(crossing, default=0.0) * (1 if schedule == "local" else 2)
    ring_bytes = 0.0
    if replicas > 1:
        largest = max(sum(block.parameters for block in here) for here in own)
        ring_bytes = 2 * (replicas - 1) / replicas * largest
    return Forecast(
        schedule,
        (stages, replicas),
        tuple(place),
        seconds,
        batch_size * replicas / seconds,
        1.0 - sum(busy) / (stages * seconds * (STEPS - half)),
        max(wire, ring_bytes),
        tuple(map(tuple, ranks.events)),
    )


def _local(
    ranks: _Ranks, own: Sequence[Sequence[BlockCost]], schedule: str, step: int, micro_batches: int, depth: int
) -> None:
    """The rows of `rank_table`, each rank after the one before it: nothing comes back."""
    edges = list(accumulate(map(len, own), initial=0))
    runs = tuple(range(a, b) for a, b in pairwise(edges))
    blocks = [block for here in own for block in here]
    arrived = 0.0
    for rank in range(len(own)):
        for row, _ in acts(rank_table(Local()(len(blocks), step), runs, rank)):
            cost = blocks[row.block]
            if row.do == "take":
                ranks.clocks[rank] = max(ranks.clocks[rank], arrived)
            elif row.do == "forward":
                ranks.work(rank, "forward", step, 0, 0.0, cost.forward)
            elif row.do == "loss":
                ranks.work(rank, "loss", step, 0, 0.0, cost.rest)  # and the way back behind it
            elif row.do == "send":
                # `depth` messages lie ready at the other end, and as many wait here.
                begun = [e.start for e in ranks.events[rank + 1] if e.kind == "forward" and e.step == step - 2 * depth]
                ranks.clocks[rank] = max(ranks.clocks[rank], begun[0] if begun else 0.0)
                arrived = ranks.send(rank, rank + 1, ranks.clocks[rank], cost.features)


def _end_to_end(
    ranks: _Ranks, own: Sequence[Sequence[BlockCost]], schedule: str, step: int, micro_batches: int, depth: int
) -> None:
    count = len(own)
    forward = [sum(b.forward for b in blocks) / micro_batches for blocks in own]
    backward = [sum(b.backward for b in blocks) / micro_batches for blocks in own]
    orders = []
    for rank in range(count):
        ahead = micro_batches if schedule != "1f1b" else min(micro_batches, count - rank)
        order = [("forward", m) for m in range(ahead)]
        for m in range(micro_batches):
            order.append(("backward", m))
            if ahead + m < micro_batches:
                order.append(("forward", ahead + m))
        orders.append(order)
    ready: dict[tuple[str, int, int], float] = {("forward", 0, m): 0.0 for m in range(micro_batches)}
    place = [0] * count
    while any(place[rank] < len(orders[rank]) for rank in range(count)):
        for rank in range(count):
            while place[rank] < len(orders[rank]):
                kind, part = orders[rank][place[rank]]
                if (kind, rank, part) not in ready:
                    break
                seconds = (forward if kind == "forward" else backward)[rank]
                end = ranks.work(rank, kind, step, part, ready[kind, rank, part], seconds)
                place[rank] += 1
                if kind == "forward" and rank + 1 < count:
                    size = own[rank][-1].features / micro_batches
                    ready["forward", rank + 1, part] = ranks.send(rank, rank + 1, end, size)
                elif kind == "forward":
                    ready["backward", rank, part] = end
                elif rank > 0:
                    size = own[rank - 1][-1].features / micro_batches
                    ready["backward", rank - 1, part] = ranks.send(rank, rank - 1, end, size)


def layouts(
    blocks: Sequence[BlockCost], link: LinkSpeed, batch_size: int, ranks: int, *, micro_batches: int
) -> list[Forecast]:
    """Every way to use ``ranks``, the fastest first; ties go to fewer bytes."""
    found = []
    for stages in (s for s in range(1, ranks + 1) if ranks % s == 0 and s <= len(blocks)):
        replicas = ranks // stages
        schedules: tuple[Schedule, ...] = ("data",) if stages == 1 else ("local", "gpipe", "1f1b")
        for schedule in schedules:
            found.append(
                forecast(
                    blocks,
                    link,
                    batch_size,
                    schedule,
                    stages=stages,
                    replicas=replicas,
                    micro_batches=1 if stages == 1 else micro_batches,
                )
            )
    return sorted(found, key=lambda f: (-f.samples_per_second, f.bytes_per_step))


def measured(network: LocalNetwork, inputs: Any, targets: Any, rounds: int = 3) -> list[BlockCost]:
    """The costs of each block of a network whose spans are single blocks, on this machine; medians of ``rounds``.

    ``backward`` is taken to be twice ``forward``, which the auxiliary networks' backward passes would hide.

    Raises:
        ConfigError: its spans are wider.
    """
    if any(span.stop - span.start > 1 for span in network.spans(1)):
        raise ConfigError(f"{network.method.name} trains several blocks at once; measure a method like dgl")
    sizes = [0] * network.num_blocks

    def ran(one: Pass, block: int) -> None:
        sent = {id(tensor): tensor for tensor in tensors_in(one.forward.features)}
        for held in one.held:
            last, _ = one.watch.last.get((held.maker, held.tag), (block, 0))
            if last > block and (tensor := held.ref()) is not None:
                sent[id(tensor)] = tensor
        sizes[block] = sum(tensor.numel() * tensor.element_size() for tensor in sent.values())

    seconds = clocked(network, inputs, targets, rounds, ran)
    labels = sum(t.numel() * t.element_size() for t in tensors_in(targets))
    found = []
    for block, size in enumerate(sizes):
        forward = seconds["forward", block]
        rest = sum(taken for (do, where), taken in seconds.items() if where == block and do != "forward")
        parameters = sum(p.numel() * p.element_size() for p in network.block_parameters(block))
        found.append(BlockCost(forward, rest, 2 * forward, size + labels, parameters))
    return found
