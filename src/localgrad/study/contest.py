"""Whole training steps of one model by many ways, in turn: memory, time, FLOPs, and which way is worth it.

A step is forward, backward, optimizer (SGD with momentum) and exchange, on random images. Its memory is what lives
above weights and optimizer state.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from localgrad import cuts, methods, models
from localgrad.costs import Cost, cost_of
from localgrad.cutting import as_cutting
from localgrad.engine import local_losses
from localgrad.errors import ConfigError, MethodError, PartitionError, TrainingError, nearest
from localgrad.localization import localize
from localgrad.measure.memory import Memory
from localgrad.measure.process_memory import allocated_growth, resident_growth, storages_mapped
from localgrad.measure.tables import markdown
from localgrad.measure.timing import clock_of, in_turns
from localgrad.method import Method
from localgrad.network import LocalNetwork, exchange
from localgrad.partition import Partition
from localgrad.planning import EXACT, LOCAL, MICRO
from localgrad.planning.planner import PRECISIONS, several_units
from localgrad.spec import MethodSpec, build_method, described, method_name
from localgrad.train.experiment import explained

Balance = Literal["count", "bytes"]
OPTIONS = ("channels_last", "compile")
REFERENCE = "end-to-end"
UNITS = "checkpointing every unit"
BUDGETS = (0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Way:
    """One way to train, yet without a model.

    Args:
        name: in tables.
        kind: ``end-to-end``, ``checkpointing``, ``accumulation`` or ``local``; pictures draw each in its own color.
        method: what trains the blocks.
        num_blocks: K; None for as many as the model has units. ``cuts``, paths of modules, say where instead.
        per_block: whether each block steps, and frees its gradients, as soon as its backward pass is done.
        inside: recompute the units inside a block in its backward pass, all but the last.
        in_backward: each parameter steps, and frees its gradient, as soon as the gradient is there.
        offload: what waits for the backward pass waits on the host (``torch.autograd.graph.save_on_cpu``).
        budgets: values of ``torch._functorch.config.activation_memory_budget`` to compile with; the leanest counts.
        variant: ``fp32`` or ``bf16`` (autocast), then any of ``channels_last`` and ``compile``, joined by ``+``.
    """

    name: str
    kind: str
    method: Method
    num_blocks: int | None = 1
    per_block: bool = False
    inside: bool = False
    in_backward: bool = False
    offload: bool = False
    budgets: tuple[float, ...] = ()
    variant: str = "fp32"
    cuts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        precision, *options = self.variant.split("+")
        if precision not in PRECISIONS:
            raise ConfigError(nearest(precision, PRECISIONS, "precision") + f" (in variant {self.variant!r})")
        for option in options:
            if option not in OPTIONS:
                raise ConfigError(nearest(option, OPTIONS, "option") + f" (in variant {self.variant!r})")
        if self.budgets and not self.has("compile"):
            raise ConfigError(f"budgets={self.budgets} with variant {self.variant!r}: they are the compiler's; write "
                              f"variant='{self.variant}+compile'")  # fmt: skip
        if self.in_backward and self.method.micro_batches > 1:
            raise ConfigError(
                f"in_backward with {self.method.micro_batches} micro-batches: each would step by itself; drop one"
            )

    @property
    def separate(self) -> bool:
        """Whether it needs blocks that can be called one by one, which some models do not allow."""
        return self.inside or self.method.recompute.blocks

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of forward passes, None for that of the weights."""
        return PRECISIONS[self.variant.partition("+")[0]]

    def has(self, option: str) -> bool:
        """Whether the variant names ``option``."""
        return option in self.variant.split("+")


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


def standard_ways(
    task: Any,
    specs: Sequence[MethodSpec],
    num_blocks: Sequence[int],
    *,
    variants: Sequence[str] = ("fp32",),
    parts: int = 4,
    combinations: bool = True,
) -> list[Way]:
    """End-to-end training, checkpointing and accumulation, then each method with and without them.

    Args:
        task: from `localgrad.tasks`.
        specs: methods as recipes write them, ``["dgl", "man"]``.
        num_blocks: every K to cut the model into.
        variants: each way is run in each of them; see `Way`.
        parts: micro-batches of accumulation.
        combinations: also run methods with per-block steps, with the units inside a block recomputed, accumulated, and
            with all of these; and end-to-end training compiled, plainly and with the best of `BUDGETS`.
    """
    e2e = methods.e2e(task)
    recomputing = methods.checkpointing(e2e)
    selective = methods.checkpointing(e2e, where="selective")
    ways = [
        Way(REFERENCE, REFERENCE, e2e),
        Way(f"{REFERENCE}, optimizer in backward", REFERENCE, e2e, in_backward=True),
        Way(UNITS, "checkpointing", recomputing, None),
        Way(f"{UNITS}, selective", "checkpointing", selective, None),
        Way(f"{UNITS}, offloaded", "checkpointing", recomputing, None, offload=True),
        *(Way(f"checkpointing K={k}", "checkpointing", recomputing, k) for k in num_blocks if k > 1),
        Way(f"accumulation x{parts}", "accumulation", methods.accumulation(e2e, parts=parts)),
        Way(f"{UNITS}, x{parts}", "checkpointing", methods.accumulation(recomputing, parts=parts), None),
    ]
    for spec in specs:
        method = build_method(spec, task)
        if not method.terms:
            raise ConfigError(
                f"method {method_name(spec)!r} has no auxiliary heads, so it is no local learning; end-to-end "
                "training, checkpointing and accumulation are measured anyway. Write a local base such as dgl"
            )
        for k in num_blocks:
            way = Way(f"{described(spec)} K={k}", "local", method, k)
            stepping = replace(way, name=f"{way.name}, per-block step", per_block=True)
            ways += [way, stepping] if combinations else [way]
            if combinations:
                ways.append(replace(stepping, name=f"{stepping.name}, checkpointing inside", inside=True))
                # All micro-batches pass a block before the next one begins, so that each block steps here too.
                several = methods.accumulation(method, parts=parts)
                ways.append(replace(way, name=f"{way.name}, x{parts}", method=several))
                accumulated = replace(stepping, name=f"{stepping.name}, x{parts}", method=several)
                inside = f"{stepping.name}, checkpointing inside, x{parts}"
                ways += [accumulated, replace(accumulated, name=inside, inside=True)]
    found = [replace(way, variant=variant) for variant in variants for way in ways]
    for variant in variants if combinations else ():
        if "compile" not in variant.split("+"):
            compiled = replace(found[0], variant=f"{variant}+compile")
            found += [compiled] * (compiled not in found)
            found.append(replace(compiled, name=f"{REFERENCE}, memory budget", budgets=BUDGETS))
    return found


class _Contestant:
    """A way with a model, an optimizer and a batch: ready to step."""

    def __init__(self, way: Way, model: nn.Module, inputs: Tensor, targets: Tensor, balance: Balance) -> None:
        self.way, self.inputs, self.targets = way, inputs, targets
        if way.has("compile"):
            model = copy.deepcopy(model)  # modules are compiled in place, and other ways run the same ones uncompiled
        self.network = network = _cut(way, model, inputs[:2], balance, len(inputs)).train()
        if way.has("channels_last"):
            network.to(memory_format=torch.channels_last)
        if way.has("compile"):
            backend = _compiler(*way.budgets)
            if network.num_blocks == 1:
                network.running.compile(backend=backend)
            else:
                network.compile_blocks(backend=backend)
        groups = [network.block_parameters(k) for k in range(network.num_blocks)]
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.per_block = way.per_block
        together = [[p] for p in self.trained] if way.in_backward else groups if way.per_block else [self.trained]
        self.optimizers = [
            torch.optim.SGD(parameters, lr=1e-3, momentum=0.9) if parameters else None for parameters in together
        ]

    def step(self) -> None:
        """One step, after which there are no gradients."""
        losses = local_losses(
            self.network,
            self.inputs,
            self.targets,
            autocast=self.way.autocast,
            on_block_done=self._update if self.per_block else None,
        )
        with contextlib.ExitStack() as stack:
            if self.way.offload:
                stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=self.inputs.is_cuda))
            # Registered anew in each step, so that what measures gradients sees them before they are freed.
            for index, parameter in enumerate(self.trained if self.way.in_backward else ()):
                hook = parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._update(index))
                stack.callback(hook.remove)
            for _, loss in losses:
                loss.backward()
        if not self.per_block and not self.way.in_backward:
            self._update(0)
        exchange(self.network)

    def _update(self, index: int) -> None:
        if (optimizer := self.optimizers[index]) is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> str:
        """What the gradients of training are, compared with back-propagation through the whole network."""
        patterns = self.network.method.spans.patterns(self.network.num_blocks)
        if any(span.start > 0 for pattern in patterns for span in pattern):
            return LOCAL
        normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.network.modules())
        return MICRO if self.network.method.micro_batches > 1 and normed else EXACT

    def _peak(self, step: Callable[[], None]) -> int | None:
        return allocated_growth(step) if self.inputs.is_cuda else resident_growth(step)

    def row(self, timeline: bool) -> Row:
        """Everything but the times, from the second step: in the first the optimizer makes its state."""
        try:
            self.step()
        except torch._dynamo.exc.TorchDynamoException as error:
            raise TrainingError(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
        cost: Cost | None = None
        ops: tuple[tuple[float, int, int], ...] = ()
        if self.way.has("compile"):
            peak = self._peak(self.step)
        else:
            seen: list[tuple[Cost, Memory]] = []
            with _Moments() as moments:
                peak = self._peak(lambda: seen.append(cost_of(self.network, self.step, timeline)))
            ((cost, memory),) = seen
            if timeline:
                ops = tuple((at, *alive) for at, alive in zip(moments.seconds, memory.timeline, strict=True))
        network = self.network
        return Row(
            name=self.way.name,
            kind=self.way.kind,
            method=self.way.method.name,
            variant=self.way.variant,
            gradients=self.gradients(),
            num_blocks=network.num_blocks,
            cuts=tuple(cut.name for cut in network.cuts),
            activation_bytes=None if cost is None else cost.activation_bytes,
            total_bytes=None if cost is None else cost.total_bytes,
            peak_bytes=peak,
            flops=None if cost is None else cost.flops,
            auxiliary_parameters=sum(p.numel() for p in network.auxiliary.parameters() if p.requires_grad),
            timeline=ops,
        )


def _compiler(budget: float | None = None) -> Callable[..., Any]:
    """Inductor with an activation memory budget. One function each, so that each compiles the same code anew."""

    def inductor(graph: Any, inputs: Any, **options: Any) -> Any:
        with torch._functorch.config.patch({} if budget is None else {"activation_memory_budget": budget}):
            return torch._dynamo.lookup_backend("inductor")(graph, inputs, **options)

    return inductor


class _Moments(TorchDispatchMode):
    """When each op was done, in seconds since the first one began."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: list[float] = []
        self.start: float | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.start = time.process_time() if self.start is None else self.start
        result = func(*args, **(kwargs or {}))
        self.seconds.append(time.process_time() - self.start)
        return result


def _cut(way: Way, model: nn.Module, example: Tensor, balance: Balance, batch_size: int) -> LocalNetwork:
    """The model cut as a way asks for; raises `MethodError` if there is nothing inside its blocks to recompute."""
    cutting: Any
    if way.cuts:
        cutting = way.cuts
    elif way.num_blocks is None:
        cutting = tuple(cut.name for cut in Partition(model, example).cuts) or 1
    elif balance == "bytes":
        cutting = cuts.by_bytes(way.num_blocks, batch_size=batch_size)
    else:
        cutting = way.num_blocks
    if way.inside:
        chosen = as_cutting(cutting).choose(model, way.method, example, shared=False)
        several = several_units(chosen.partition, chosen.cuts)
        if not several:
            raise MethodError("every block is a single unit already, with nothing inside to recompute")
        cutting = cuts.recomputed(tuple(cut.name for cut in chosen.cuts) or 1, several)
    return localize(model, way.method, cutting, example=example)


def contest(
    model: nn.Module | str,
    ways: Sequence[Way],
    *,
    batch_size: int,
    image_size: int = 224,
    channels: int = 3,
    num_classes: int = 1000,
    balance: Balance = "count",
    device: torch.device | str = "cpu",
    rounds: int = 5,
    seed: int = 0,
    timeline: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Contest:
    """Run steps of every way, one after the other in each round, and measure them.

    All ways train the same weights, so that a step of one is as costly whatever the others did; compiled ones a copy.

    Args:
        model: a name that `localgrad.models.create` knows, or a module, which is copied.
        ways: the first one is the reference.
        batch_size: images in a step, of shape ``(channels, image_size, image_size)``, from a normal distribution.
        num_classes: of the targets.
        balance: what blocks have equally much of, units or bytes of memory.
        rounds: timed steps of each way.
        timeline: keep what is alive after every op in the rows.
        progress: told what is being measured.

    Raises:
        ConfigError: a number below 1, or a model that does not exist.
        TrainingError: the batch is too large or too small for the reference; other ways are then skipped.
        PartitionError: the model cannot be cut so.
    """
    given = {"batch_size": batch_size, "image_size": image_size, "channels": channels, "rounds": rounds}
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"{name}={value}; it must be at least 1")
    if not ways:
        raise ConfigError("no ways to compare; give some, for instance those of standard_ways(task, [['dgl']], [4])")
    device = torch.device(device)
    torch.manual_seed(seed)
    title = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        model = models.create(model, num_classes=num_classes, in_channels=channels, image_size=image_size)
    else:
        model = copy.deepcopy(model)
    model.to(device)
    inputs = torch.randn(batch_size, channels, image_size, image_size, device=device)
    targets = torch.randint(num_classes, (batch_size,), device=device)
    laid_out: dict[bool, tuple[nn.Module, Tensor]] = {False: (model, inputs)}
    contestants: list[_Contestant] = []
    rows: list[Row] = []
    skipped: list[str] = []
    with storages_mapped():
        for way in ways:
            last = way.has("channels_last")
            if last not in laid_out:
                other = copy.deepcopy(model).to(memory_format=torch.channels_last)
                laid_out[last] = other, inputs.contiguous(memory_format=torch.channels_last)
            progress(f"memory of {way.name}, {way.variant}")
            tried = [replace(way, name=f"{way.name} {b}", budgets=(b,)) for b in way.budgets] or [way]
            try:
                if way.offload and device.type == "cpu":
                    raise MethodError("on a CPU the host is the device; nothing can be moved off it")
                measured = []
                for one in tried:
                    contestant = _Contestant(one, laid_out[last][0], laid_out[last][1], targets, balance)
                    with explained(inputs):
                        measured.append((contestant.row(timeline), contestant))
                row, contestant = min(measured, key=lambda pair: pair[0].memory or 0)
            except (MethodError, PartitionError, TrainingError) as error:
                if not contestants or (isinstance(error, PartitionError) and not way.separate):
                    raise
                skipped.append(f"{way.name}: {error}")
                continue
            rows.append(row)
            contestants.append(contestant)
    clock, named = clock_of(device)
    steps = [contestant.step for contestant in contestants]
    seconds = in_turns(steps, rounds, device, clock=clock, progress=progress)
    ratios = [statistics.median(a / b for a, b in zip(taken, seconds[0], strict=True)) for taken in seconds]
    rows = [
        replace(row, seconds=statistics.median(taken), time_ratio=ratio, rounds=tuple(round(s, 6) for s in taken))
        for row, taken, ratio in zip(rows, seconds, ratios, strict=True)
    ]
    return Contest(
        model=title,
        parameters=sum(p.numel() for p in model.parameters()),
        batch_size=batch_size,
        image_shape=(channels, image_size, image_size),
        num_classes=num_classes,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        clock=named,
        torch=torch.__version__,
        rows=tuple(rows),
        skipped=tuple(skipped),
    )
