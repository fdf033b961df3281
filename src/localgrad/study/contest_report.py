"""What a contest found, and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from localgrad.measure.tables import markdown


@dataclass(frozen=True)
class Row:
    """What steps of one way were found to cost.

    Args:
        gradients: ``exact``, ``exact, BatchNorm over micro-batches`` or ``local``.
        num_blocks: K, and ``cuts`` the paths of the modules that blocks 1 .. K-1 begin with.
        activation_bytes: the most that was alive at once, gradients of parameters left out; ``total_bytes`` with them.
            Live tensors, above weights and optimizer state; None for compiled ways, whose tensors cannot be seen.
        peak_bytes: cross-check: growth of the CUDA allocator's peak, or of the process's resident memory on a CPU; None
            where the system does not tell.
        seconds: median of a step.
        time_ratio: median over the rounds of its seconds by those of the reference in the same round.
        rounds: seconds of each.
        flops: of forward and backward, 2 per multiply-add; None for compiled ways.
        auxiliary_parameters: trained besides the model's.
        timeline: (seconds, live bytes, gradients among them) after every op of a step, if it was asked for. The seconds
            hold what tracking costs, and on CUDA they are those at which the op was started.
    """

    name: str
    kind: str
    method: str
    variant: str
    gradients: str
    num_blocks: int
    cuts: tuple[str, ...]
    activation_bytes: int | None
    total_bytes: int | None
    peak_bytes: int | None
    flops: float | None
    auxiliary_parameters: int
    seconds: float = 0.0
    time_ratio: float = 0.0
    rounds: tuple[float, ...] = ()
    timeline: tuple[tuple[float, int, int], ...] = ()

    @property
    def memory(self) -> int | None:
        """What ways are compared by: ``total_bytes``, or ``peak_bytes`` where there are none."""
        return self.peak_bytes if self.total_bytes is None else self.total_bytes

    @property
    def label(self) -> str:
        """Name and, unless it is plain float32, variant."""
        return self.name if self.variant == "fp32" else f"{self.name}, {self.variant}"

    def dominates(self, other: Row) -> bool:
        """Whether it needs neither more memory nor more time, and less of one."""
        if self.memory is None or other.memory is None:
            return False
        mine, theirs = (self.memory, self.time_ratio), (other.memory, other.time_ratio)
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
        headings = ["way", "activations", "total", process, "time", "FLOPs", "images/s", "auxiliary", "gradients", ""]
        table = [headings]
        for row in self.rows:
            by = self.dominated_by(row)
            table.append(
                [
                    row.label,
                    _ratio(row.activation_bytes, first.activation_bytes),
                    _ratio(row.total_bytes, first.total_bytes),
                    _ratio(row.peak_bytes, first.peak_bytes),
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
            ("activations", first.activation_bytes), ("total", first.total_bytes), (process, first.peak_bytes),
        )]  # fmt: skip
        notes = (
            f"Ratios to {first.label}: {', '.join(bytes_)}, {first.seconds * 1e3:.1f} ms. Time: {self.clock}, median "
        )
        notes += (
            f"of {len(first.rounds)} rounds, ways in turn. Auxiliary: parameters trained besides the model's, as a "
        )
        notes += "ratio to them. below: a way with exact gradients needs neither more memory nor more time."
        return "\n".join([title, "", *lines, "", notes, *(f"Left out: {reason}" for reason in self.skipped)])


def _ratio(value: float | None, reference: float | None) -> str:
    return "-" if value is None or not reference else f"{value / reference:.3f}"
