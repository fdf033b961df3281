"""What a plan says: the ways to train, which one to take, the code for it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from localgrad.measure.plots import BLUE, INK, KINDS, PURPLE, SKY, VERMILLION, drawing, label, log_scale
from localgrad.measure.sizes import size
from localgrad.measure.tables import aligned
from localgrad.measure.work import Rates
from localgrad.planning.streaming import Traffic

EXACT, MICRO, LOCAL = "exact", "exact, BatchNorm over micro-batches", "local"
OWN_LOSS = "task.loss(model(x), localgrad.Batch(x, y, step=0))"
TIE = 1.05  # predicted step times closer than this count as equal
WORTH = 1.2  # so much faster a local form must be to be recommended where better gradients fit


@dataclass(frozen=True)
class Option:
    """One way to train.

    Args:
        name: for instance ``local K=8, per-block step``.
        kind: ``plain``, ``accumulation``, ``checkpointing``, ``in_backward`` (one of them, each parameter stepping as
            soon as its gradient is there), ``local``, ``resident`` (local, one block on the device at a time), or
            ``offloaded``: what others move to the host, by formula and for comparison only.
        method: the expression that makes the method, for instance ``localgrad.methods.dgl(task)``.
        cuts: paths of the modules that blocks begin with, as for `localgrad.localize`; ``recompute`` the indices of
            the blocks that are recomputed unit by unit.
        micro_batches: parts a batch is run in.
        per_block: whether each block steps, and frees its gradients, as soon as its backward pass is done.
        weights: bytes of parameters and buffers, auxiliary networks included.
        optimizer: bytes of the optimizer's state.
        gradients: bytes of parameter gradients alive at the peak.
        activations: bytes of everything else alive at the peak: the batch, what is saved for backward, temporaries.
        flops_ratio: FLOPs of a step as a ratio to plain training; ``time_ratio`` the same for its predicted duration.
        update: what the gradients are: ``exact``, ``exact, BatchNorm over micro-batches`` or ``local``.
        fits: whether ``peak`` is within the memory; None without a budget.
        traffic: between host and device, which is part of ``time_ratio``; None where there is none.
    """

    name: str
    kind: str
    method: str
    cuts: tuple[str, ...]
    recompute: tuple[int, ...]
    micro_batches: int
    per_block: bool
    weights: int
    optimizer: int
    gradients: int
    activations: int
    flops_ratio: float
    time_ratio: float
    update: str
    fits: bool | None = None
    traffic: Traffic | None = None

    @property
    def peak(self) -> int:
        """Bytes alive at the fullest moment of a training step."""
        return self.weights + self.optimizer + self.gradients + self.activations

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.cuts) + 1

    @property
    def call(self) -> str:
        """How the network is made; empty for plain training, which needs none."""
        if self.kind == "plain":
            return ""
        where = repr(self.cuts or 1)
        where = f"localgrad.cuts.recomputed({where}, {self.recompute!r})" if self.recompute else where
        return f"localgrad.localize(model, method, {where}, example=x[:2])"


@dataclass(frozen=True)
class Plan:
    """What `plan` returns; ``print`` it for the table.

    Args:
        model: its name. ``parameters`` are counted.
        batch_size: images in a step, of shape ``image_shape`` (C, H, W).
        task: the line that makes it; empty for one with options, as it was given.
        memory: the budget in bytes, None if none was given; ``headroom`` is the share of it that is left free.
        largest_unit: bytes that the unit of the model with the most saves for its backward pass: no cut, without
            recomputation inside it, goes below. Its path is ``largest_name``.
        options: every way that was tried; plain training first.
        recommended: the fastest that fits; None if nothing does or there is no budget.
    """

    model: str
    parameters: int
    batch_size: int
    image_shape: tuple[int, int, int]
    task: str
    optimizer: str
    precision: str
    memory: int | None
    headroom: float
    rates: Rates
    largest_unit: int
    largest_name: str
    options: tuple[Option, ...]
    skipped: tuple[str, ...] = field(default=())

    @property
    def recommended(self) -> Option | None:
        """The fastest option that fits; among those within 5 % of it exact gradients first, then the fewest parts.

        A local form only where no other fits or all are 1.2 times as slow, as it costs accuracy. One that brings blocks
        from the host only where no other fits.
        """
        fitting = [option for option in self.options if option.fits and option.traffic is None]
        fitting = fitting or [option for option in self.options if option.fits and option.kind == "resident"]
        if not fitting:
            return None
        if fitting[0].kind == "plain":
            return fitting[0]
        fastest = min(option.time_ratio for option in fitting)
        others = [option for option in fitting if option.kind not in ("local", "resident")]
        if any(option.time_ratio <= WORTH * fastest for option in others):
            fitting = others
        limit = TIE * min(option.time_ratio for option in fitting)
        order = (EXACT, MICRO)
        return min(
            (option for option in fitting if option.time_ratio <= limit),
            key=lambda o: (order.index(o.update) if o.update in order else 2, o.micro_batches, o.num_blocks),
        )

    @property
    def verdict(self) -> str:
        """The recommendation in words, and whether local learning is needed at all."""
        if self.memory is None:
            return "No memory was given, so nothing is recommended: say how much there is (memory='8GiB')."
        best, smallest = self.recommended, min(self.options, key=lambda option: option.peak)
        if best is None:
            return (
                f"Nothing fits in {size(self.memory)}. The smallest is {smallest.name}, {size(smallest.peak)}; its "
                f"weights and optimizer state alone take {size(smallest.weights + smallest.optimizer)}. Use smaller "
                "batches or images, bf16, or a smaller model."
            )
        if best.kind == "plain":
            return f"Plain training fits ({size(best.peak)}): you need none of this library to train this model."
        exact = [o for o in self.options if o.fits and o.kind not in ("local", "resident")]
        text = f"Plain training does not fit ({size(self.options[0].peak)}). Use {best.name}: {size(best.peak)}, "
        text += f"{best.time_ratio:.2f} of the time of a plain step, gradients {best.update}."
        if best.kind not in ("local", "resident"):
            return text + " Local learning is not needed."
        if exact:
            other = min(exact, key=lambda option: option.time_ratio)
            text += (
                f" Local learning is not the only way: {other.name} fits too, {size(other.peak)} and "
                f"{other.time_ratio:.2f} of the time, gradients {other.update}."
            )
        else:
            text += " Nothing with end-to-end gradients fits."
        return text

    @property
    def code(self) -> str:
        """Python that trains as recommended, for a ``model``, an ``optimizer`` and a ``loader`` that exist."""
        return "" if self.recommended is None else self.code_of(self.recommended)

    def code_of(self, option: Option) -> str:
        """The same for any of the options."""
        bf16 = self.precision == "bf16"
        imports = ["import torch", "import localgrad", "", *([f"task = {self.task}"] if self.task else [])]
        if option.kind == "plain":
            plain = self.task.startswith("localgrad.tasks.classification")
            forward = "torch.nn.functional.cross_entropy(model(x), y)" if plain else OWN_LOSS
            lines = ["for x, y in loader:", f"    loss = {forward}", "    loss.backward()"]
            if bf16:
                lines[1:2] = ["    with torch.autocast(x.device.type, torch.bfloat16):", f"        loss = {forward}"]
            needed = ["import torch", ""] if plain else [*imports, ""]
            return "\n".join([*needed, *lines, "    optimizer.step()", "    optimizer.zero_grad()"])
        make = {
            "sgd": "torch.optim.SGD({}, lr=0.1, momentum=0.9)",
            "adamw": "torch.optim.AdamW({}, lr=1e-3)",
        }[self.optimizer]
        lines = [
            *imports,
            f"method = {option.method}",
            "x, y = next(iter(loader))",
            f"network = {option.call}",
        ]
        arguments = "network, x, y, step" + ", autocast=torch.bfloat16" * bf16
        if option.per_block:
            if option.kind == "resident":
                lines.append('localgrad.resident(network, "cuda" if torch.cuda.is_available() else "cpu")')
            lines += [
                "blocks = [network.block_parameters(k) for k in range(network.num_blocks)]",
                f"optimizers = [{make.format('parameters')} for parameters in blocks]",
                "",
                "def step_block(k):",
                "    optimizers[k].step()",
                "    optimizers[k].zero_grad()",
                "",
            ]
            arguments += ", on_block_done=step_block"
        elif option.kind == "in_backward":
            lines += [
                f"optimizers = {{p: {make.format('[p]')} for p in network.parameters()}}",
                "",
                "def step_parameter(p):",
                "    optimizers[p].step()",
                "    optimizers[p].zero_grad()",
                "",
                "for p in optimizers:",
                "    p.register_post_accumulate_grad_hook(step_parameter)",
                "",
            ]
        else:
            lines += [f"optimizer = {make.format('network.parameters()')}", ""]
        lines += [
            "for step, (x, y) in enumerate(loader):",
            f"    for span, loss in localgrad.local_losses({arguments}):",
            "        loss.backward()",
        ]
        if not (option.per_block or option.kind == "in_backward"):
            lines += ["    optimizer.step()", "    optimizer.zero_grad()"]
        if option.kind in ("local", "resident"):
            lines.append("    localgrad.exchange(network)")
        return "\n".join(lines)

    def picture(self, path: str | Path) -> None:
        """Draw peak memory against step time, one point for each option and a line for each kind."""
        _draw(self, Path(path))

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        best = self.recommended
        rows = [{**asdict(o), "peak": o.peak, "num_blocks": o.num_blocks, "call": o.call} for o in self.options]
        return {
            **asdict(self),
            "options": rows,
            "recommended": best.name if best else None,
            "verdict": self.verdict,
            "code": self.code,
        }

    def __str__(self) -> str:
        headings = "way to train|peak|weights|optim.|grads|activ.|FLOPs|time|gradients|fits".split("|")  # noqa: SIM905
        rows = [headings]
        for o in self.options:
            sizes = [f"{b / 2**30:.2f}" for b in (o.peak, o.weights, o.optimizer, o.gradients, o.activations)]
            fits = {None: "", True: "yes", False: "no"}[o.fits]
            rows.append([o.name, *sizes, f"{o.flops_ratio:.2f}", f"{o.time_ratio:.2f}", o.update, fits])
        lines = ["  ".join(cells).rstrip() for cells in aligned(rows, text=(0, len(headings) - 2, len(headings) - 1))]
        shape = "x".join(map(str, self.image_shape))
        title = f"{self.model}, {self.parameters / 1e6:.1f} M parameters, {self.batch_size} images of {shape}, "
        title += f"{self.optimizer}, {self.precision}"
        if self.memory is not None:
            title += f"; {size(self.memory)}, of which {self.headroom:.0%} are left free"
        notes = "GiB at the fullest moment of a step; FLOPs and time as ratios to plain training. Floor of any cut: "
        notes += f"{size(self.largest_unit)} saved by the largest unit, {self.largest_name}"
        cut = [o for o in self.options if o.kind == "local" and not o.recompute and o.micro_batches == 1]
        if cut:
            least = min(cut, key=lambda option: option.activations)
            notes += f"; {least.name} needs {least.activations / self.largest_unit:.2f} times that for activations"
        notes += "."
        streamed = [(o, o.traffic) for o in self.options if o.traffic is not None and o.kind == "resident"]
        notes += "".join(f"\n{traffic.told(o.name, o.micro_batches, self.rates)}" for o, traffic in streamed)
        skipped = [f"Left out: {reason}" for reason in self.skipped]
        return "\n".join([title, *lines, notes, *skipped, "", self.verdict])


def _draw(plan: Plan, path: Path) -> None:
    """One point for each option, a line for each kind, the budget and what is recommended."""
    styles = {
        "plain": ("*", INK),
        "accumulation": ("s", KINDS["accumulation"]),
        "checkpointing": ("o", KINDS["checkpointing"]),
        "checkpointing, micro-batches": ("p", KINDS["checkpointing"]),
        "optimizer in backward": (">", KINDS["checkpointing"]),
        "local": ("D", BLUE),
        "local, per-block step": ("^", BLUE),
        "local, recomputed": ("v", PURPLE),
        "local, recomputed, per-block step": ("<", PURPLE),
        "local, micro-batches": ("P", BLUE),
        "local, micro-batches, per-block step": ("X", BLUE),
        "resident, per-block step": ("h", SKY),
        "resident, micro-batches, per-block step": ("d", SKY),
        "offloaded": ("1", INK),
    }  # marker and color
    groups: dict[str, list[Option]] = {}
    for option in plan.options:
        in_parts = option.micro_batches > 1 and option.kind != "accumulation"
        group = option.kind.replace("in_", "optimizer in ") + ", micro-batches" * in_parts
        group += ", recomputed" * (option.kind == "local" and "recomputed" in option.name and not in_parts)
        group += ", per-block step" * option.per_block
        groups.setdefault(group, []).append(option)
    points: list[tuple[float, float]] = []
    texts = []
    with drawing(path, height=6.2) as (figure, (axis,)):
        for group, members in groups.items():
            marker, color = styles.get(group, (".", INK))
            places = [(o.peak / 2**30, o.time_ratio) for o in members]
            line = "" if group == "offloaded" else "-"
            axis.plot(*zip(*places, strict=True), marker=marker, color=color, linestyle=line, linewidth=1, label=group,
                      markersize=7)  # fmt: skip
            for option, place in zip(members, places, strict=True):
                note = f"x{option.micro_batches}" if option.micro_batches > 1 else f"K={option.num_blocks}"
                note = option.name.rpartition(", ")[2] if option.kind == "offloaded" else note
                crowded = any(abs(math.log(place[0] / c)) < 0.04 and abs(place[1] - d) < 0.02 for c, d in points)
                points.append(place)
                texts.append("" if option.kind == "plain" or crowded else note)
        if plan.memory is not None:
            for limit, style in ((plan.memory, "-"), (plan.memory * (1 - plan.headroom), ":")):
                axis.axvline(limit / 2**30, color=INK, linewidth=1, linestyle=style)
            axis.annotate(f" {size(plan.memory)}", (plan.memory / 2**30, 0.98), xycoords=("data", "axes fraction"),
                          va="top")  # fmt: skip
        if (best := plan.recommended) is not None:
            ring = {"s": 230, "facecolors": "none", "edgecolors": VERMILLION, "linewidths": 1.8, "zorder": 5}
            axis.scatter([best.peak / 2**30], [best.time_ratio], label="recommended", **ring)
        log_scale(axis, [o.peak / 2**30 for o in plan.options])
        axis.set_xlabel("predicted peak, GiB")
        axis.set_ylabel("predicted step time, plain training = 1")
        axis.set_title(f"{plan.model}, {plan.batch_size} images, {plan.optimizer}, {plan.precision}")
        figure.legend(loc="outside lower center", ncols=3)
        label(axis, points, texts)
