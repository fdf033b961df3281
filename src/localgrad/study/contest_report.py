"""What a contest found, and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from localgrad.measure.tables import markdown
from localgrad.study.ways import labelled

Timeline = tuple[tuple[float, int, int, int], ...]


def thinned(timeline: Timeline, count: int = 400) -> Timeline:
    """The fullest moment of each of ``count`` stretches, and the last one; times in percent of the step."""
    stride = -(-len(timeline) // count)
    fullest = [max(timeline[k : k + stride], key=lambda row: row[1]) for k in range(0, len(timeline), stride)]
    end = timeline[-1][0]
    kept = [*fullest, timeline[-1]]
    return tuple((round(100 * seconds / end, 2), live, grads, here) for seconds, live, grads, here in kept)


@dataclass(frozen=True)
class Row:
    """What steps of one way were found to cost.

    Args:
        gradients: ``exact``, ``exact, BatchNorm over micro-batches`` or ``local``.
        num_blocks: K, and ``cuts`` the paths of the modules that blocks 1 .. K-1 begin with.
        weight_bytes: of parameters and buffers, those of heads and twins too; of a resident network those that stay on
            the device, and ``state_bytes`` of these. What visits it is in ``total_bytes``.
        state_bytes: of the optimizers' state on the device, scales and tables of 8-bit state too.
        activation_bytes: the most that was alive at once, gradients of parameters left out; ``total_bytes`` with them.
            Live tensors, above weights and optimizer state; None for compiled ways, whose tensors cannot be seen. Nor
            is what optimizers of other libraries hold within a step, which is in ``peak_bytes`` only.
        peak_bytes: cross-check: growth of the CUDA allocator's peak, or of the process's resident memory on a CPU; None
            where the system does not tell.
        seconds: median of a step.
        time_ratio: median over the rounds of its seconds by those of the reference in the same round.
        rounds: seconds of each.
        flops: of forward and backward, 2 per multiply-add; None for compiled ways.
        auxiliary_parameters: trained besides the model's.
        timeline: (seconds, live bytes, gradients among them, weights and state that visit the device among them) after
            every op of a step, if it was asked for. The seconds hold what tracking costs, and on CUDA they are those at
            which the op was started.
    """

    name: str
    kind: str
    method: str
    variant: str
    optimizer: str
    gradients: str
    num_blocks: int
    cuts: tuple[str, ...]
    weight_bytes: int
    state_bytes: int
    activation_bytes: int | None
    total_bytes: int | None
    peak_bytes: int | None
    flops: float | None
    auxiliary_parameters: int
    seconds: float = 0.0
    time_ratio: float = 0.0
    rounds: tuple[float, ...] = ()
    timeline: Timeline = ()

    @property
    def memory(self) -> int | None:
        """Weights, optimizer state and ``total_bytes``, or ``peak_bytes`` where there are none; None without both."""
        above = self.peak_bytes if self.total_bytes is None else self.total_bytes
        return None if above is None else self.weight_bytes + self.state_bytes + above

    @property
    def label(self) -> str:
        """What tables call it."""
        return labelled(self.name, self.optimizer, self.variant)

    def beside(self, other: Row) -> tuple[int, int] | None:
        """Memory of both, measured alike: by ``total_bytes`` where both have it, else by ``peak_bytes`` if both do."""
        for mine, theirs in ((self.total_bytes, other.total_bytes), (self.peak_bytes, other.peak_bytes)):
            if mine is not None and theirs is not None:
                return self.weight_bytes + self.state_bytes + mine, other.weight_bytes + other.state_bytes + theirs
        return None

    def memory_ratio(self, reference: Row) -> float | None:
        """Memory as a ratio to the reference's, measured alike."""
        pair = self.beside(reference)
        return None if pair is None else pair[0] / pair[1]

    def dominates(self, other: Row) -> bool:
        """Whether it needs neither more memory nor more time, and less of one."""
        if (pair := self.beside(other)) is None:
            return False
        mine, theirs = (pair[0], self.time_ratio), (pair[1], other.time_ratio)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Contest:
    """What `contest` returns; ``print`` it for the table. The first row is the reference, end-to-end in float32."""

    model: str
    parameters: int
    batch_size: int
    image_shape: tuple[int, int, int]
    num_classes: int
    device: str
    threads: int
    clock: str
    torch: str
    rows: tuple[Row, ...]
    skipped: tuple[str, ...] = ()

    @property
    def frontier(self) -> list[Row]:
        """Rows that no other one dominates, leanest first."""
        rows = [row for row in self.rows if row.memory is not None]
        best = [row for row in rows if not any(other.dominates(row) for other in rows)]
        return sorted(best, key=lambda row: (row.memory, row.time_ratio))

    def dominated_by(self, row: Row) -> Row | None:
        """The way with exact gradients that a local one is dominated by, the fastest if there are several."""
        others = [other for other in self.rows if other.kind != "local" and other.dominates(row)]
        return min(others, key=lambda other: other.time_ratio) if row.kind == "local" and others else None

    def as_dict(self) -> dict[str, Any]:
        """Everything but the timelines, ready for JSON."""
        rows = [asdict(replace(row, timeline=())) for row in self.rows]
        for values, row in zip(rows, self.rows, strict=True):
            del values["timeline"]
            by = self.dominated_by(row)
            values["on_frontier"], values["dominated_by"] = row in self.frontier, by.label if by else None
        return {**asdict(replace(self, rows=())), "rows": rows}

    def __str__(self) -> str:
        first, frontier = self.rows[0], self.frontier
        process = "allocator" if self.device != "cpu" else "process"
        headings = ["way", "activations", "with gradients", process, "state", "memory"]
        headings += ["time", "FLOPs", "images/s", "auxiliary", "gradients", ""]
        table = [headings]
        for row in self.rows:
            by = self.dominated_by(row)
            table.append(
                [
                    row.label,
                    _ratio(row.activation_bytes, first.activation_bytes),
                    _ratio(row.total_bytes, first.total_bytes),
                    _ratio(row.peak_bytes, first.peak_bytes),
                    _ratio(row.state_bytes, first.state_bytes),
                    _ratio(row.memory_ratio(first), 1.0),
                    f"{row.time_ratio:.2f}",
                    _ratio(row.flops, first.flops),
                    f"{self.batch_size / row.seconds:.3g}",
                    f"{row.auxiliary_parameters / self.parameters:.2f}",
                    row.gradients,
                    "frontier" if row in frontier else f"below {by.label}" if by else "",
                ]
            )
        lines = markdown(table, text=(0, len(headings) - 2, len(headings) - 1))
        shape = "x".join(map(str, self.image_shape))
        title = f"{self.model}, {self.parameters / 1e6:.2f} M parameters, {self.batch_size} images of {shape} a step, "
        title += f"{self.device}, {self.threads} thread{'s' * (self.threads > 1)}, torch {self.torch}"
        bytes_ = [f"{name} {(b or 0) / 2**20:.1f} MiB" for name, b in (
            ("activations", first.activation_bytes), ("with gradients", first.total_bytes), (process, first.peak_bytes),
            ("state", first.state_bytes), ("memory", first.memory),
        )]  # fmt: skip
        notes = [
            f"Ratios to {first.label}: {', '.join(bytes_)}, {first.seconds * 1e3:.1f} ms.",
            f"Time: {self.clock}, median of {len(first.rounds)} rounds, ways in turn.",
            "Auxiliary: parameters trained besides the model's, as a ratio to them.",
            "State: of the optimizer, on the device.",
            "Memory: weights, those of heads too, state, and activations with gradients;",
            f"where a way is compiled, the growth of the {process} instead of the last, for end-to-end too.",
            "below: a way with exact gradients needs neither more memory nor more time.",
        ]
        return "\n".join([title, "", *lines, "", " ".join(notes), *(f"Left out: {reason}" for reason in self.skipped)])


def _ratio(value: float | None, reference: float | None) -> str:
    return "-" if value is None or not reference else f"{value / reference:.3f}"
