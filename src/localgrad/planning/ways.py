"""Every way to train a model, tried without data.

The engine runs each on fake tensors, so that a 20 GiB step is counted by the same tracker that counts a real one, on a
laptop, in seconds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from localgrad import methods, models, tasks
from localgrad.errors import ConfigError, MethodError, PartitionError, nearest
from localgrad.measure.sizes import read_memory, size
from localgrad.measure.work import Rates, measure_rates
from localgrad.method import Method
from localgrad.network import LocalNetwork
from localgrad.partition.choose import Held
from localgrad.planning.planner import PRECISIONS, Planner, Predicted
from localgrad.planning.report import EXACT, LOCAL, MICRO, Option, Plan
from localgrad.planning.streaming import exact_ways, traffic
from localgrad.spec import MethodSpec, as_code, build_method, parse_method
from localgrad.task import Task

STATES = {"sgd": 1, "adamw": 2}  # copies of the trained parameters that the optimizer keeps; SGD with momentum
MOST_PARTS = 64
GRADIENTS: tuple[Held, Held] = ("earlier", "own")  # alive where the optimizer steps at the end, and block by block


def plan(
    model: nn.Module | str,
    *,
    batch_size: int,
    memory: str | int | None = None,
    image_size: int = 224,
    channels: int = 3,
    num_classes: int = 1000,
    task: Task | None = None,
    targets: Any = None,
    method: str | MethodSpec | Method = "dgl",
    optimizer: Literal["sgd", "adamw"] = "sgd",
    precision: Literal["fp32", "bf16"] = "fp32",
    headroom: float = 0.1,
    rates: Rates | None = None,
) -> Plan:
    """Predict peak memory and step time of every way to train ``model``, without training it or needing the memory.

    ``peak = weights + optimizer state + max over the step (gradients + activations)``. A step is forward, backward and
    the optimizer. Times are promised as ratios only: forward and backward, from the FLOPs and bytes of each operation.

    Args:
        model: a module, on any device, or a name that `localgrad.models.create` knows; left as it is.
        batch_size: images in a step.
        memory: what there is, ``"8GiB"`` or bytes; None to compare only.
        image_size, channels: of the square images.
        num_classes: of classification, with a name only; a module tells by itself.
        task: from `localgrad.tasks`, or one of yours; None for classification, or for the task of a `Method`.
        targets: of a few samples, ``y[:2]``: for `localgrad.tasks.custom` and tasks of yours without a method
            ``blank(samples, shape)``, to know their form.
        method: for local learning, a base with its plug-ins: ``"dgl"``, ``"infopro+man"``, a specification as in a
            recipe, or a `Method`.
        optimizer: ``sgd`` (with momentum: one copy of the parameters) or ``adamw`` (two).
        precision: ``bf16`` is autocast; weights stay as they are.
        headroom: share of ``memory`` left free for what is not counted: the CUDA context, workspaces of kernels, and
            what an allocator loses by rounding.
        rates: what the device that will train does; None measures the one the model is on.

    Raises:
        ConfigError: a value outside its range, a model that is no classifier and no ``task``, or a loss that decides by
            values, as that of detection does.
        PartitionError: the model cannot be cut.

    Example:
        >>> import localgrad
        >>> ways = localgrad.plan("resnet20", batch_size=128, image_size=32, memory="40MiB", num_classes=10)
        >>> ways.options[0].fits, ways.recommended.fits
        (False, True)
    """
    budget = None if memory is None else read_memory(memory)
    _check(batch_size, image_size, channels, headroom, optimizer, precision)
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        model = _created(model, num_classes if task is None else task.num_outputs, channels, image_size)
    dtype = PRECISIONS[precision] or torch.float32
    if rates is None:
        device = next(model.parameters()).device
        rates = measure_rates(None if device.type == "meta" else device, dtype)
    if isinstance(method, Method):
        if task not in (None, method.task):
            raise ConfigError(f"task={task} and a method for {method.task}; give one of them")
        task = method.task
    planner = Planner(model, (channels, image_size, image_size), batch_size, precision, rates, task, targets)
    task = planner.task
    if isinstance(method, Method):
        local, text = method, "method"
    else:
        spec = parse_method(method) if isinstance(method, str) else method
        local, text = build_method(spec, task), as_code(spec)
    if not local.terms:
        raise ConfigError(
            f"method={local.name}: it has no auxiliary heads, so it is no local learning; end-to-end training, "
            "accumulation and checkpointing are planned anyway. Write a local base such as dgl"
        )
    options, skipped = _Ways(planner, task, local, text, optimizer, budget, headroom).all()
    largest, largest_name = planner.largest_unit()
    return Plan(
        model=name,
        parameters=sum(p.numel() for p in model.parameters()),
        batch_size=batch_size,
        image_shape=(channels, image_size, image_size),
        task=_written(task),
        optimizer=optimizer,
        precision=precision,
        memory=budget,
        headroom=headroom,
        rates=rates,
        largest_unit=largest,
        largest_name=largest_name,
        options=tuple(options),
        skipped=tuple(skipped),
    )


def _written(task: Task) -> str:
    """The line that makes a task; empty for one that has options, which the reader has."""
    known = (tasks.classification, tasks.segmentation, tasks.regression, tasks.multilabel)
    make = next((one for one in known if one.__name__ == type(task).__name__.lower()), None)
    alike = make is not None and make(task.num_outputs) == task
    return f"localgrad.tasks.{make.__name__}({task.num_outputs})" if make is not None and alike else ""


def fit(
    model: nn.Module,
    method: Method,
    memory: str | int,
    example: Any,
    batch_size: int,
    targets: Any = None,
    headroom: float = 0.1,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Where to cut, and which blocks to recompute unit by unit, so that a training step fits in ``memory``.

    The fewest blocks that fit, cut by bytes: fewer blocks are fewer heads, and less of the gradient is lost. Where no
    number of blocks fits, the fewest whose units are recomputed. Counted as `plan` does, for float32, one step of
    AdamW (two copies of the parameters) at the end: an optimizer with less state, or one that steps block by block,
    fits all the more.

    Args:
        model, method, example: as for `localgrad.localize`; the example is one tensor of floats.
        memory: ``"8GiB"`` or bytes, of which the share ``headroom`` is left free.
        batch_size: images in a step.
        targets: as for `plan`.

    Returns:
        names of the modules that blocks begin with, and indices of the blocks to recompute; none, and a warning, if
        plain training fits.

    Raises:
        ConfigError: nothing fits, or inputs, targets or the loss are such as planning cannot run, see `plan`.
    """
    if not isinstance(example, Tensor) or not example.is_floating_point():
        raise ConfigError(
            f"cuts.fits({memory!r}) plans models that read one tensor of floats, such as images (B, C, H, W); write a "
            "number of blocks, 4, or names of modules that blocks begin with, ('layer2', 'layer3')"
        )
    limit = int(read_memory(memory) * (1 - headroom))
    shape = tuple(example.shape[1:])
    planner = Planner(model, shape, batch_size, "fp32", Rates(1.0, 1.0), method.task, targets)

    def peak(run: Method, cuts: Sequence[str], recompute: Sequence[int] = ()) -> int:
        step = planner.step(planner.network(run, cuts, recompute), run)
        return step.weights + STATES["adamw"] * step.trained + sum(step.peak)

    if (plain := peak(methods.e2e(method.task), ())) <= limit:
        warnings.warn(
            f"cuts.fits({memory!r}): plain training fits ({size(plain)}), so nothing is cut", UserWarning, stacklevel=4
        )
        return (), ()
    smallest, unrecomputed = plain, ""
    found: list[tuple[str, ...]] = []
    for num_blocks in range(2, len(planner.partition.cuts) + 2):
        found.append(tuple(cut.name for cut in planner.cuts(num_blocks, method)))
        needed = peak(method, found[-1])
        if needed <= limit:
            return found[-1], ()
        smallest = min(smallest, needed)
    for cuts in found:
        recompute = planner.several_units(cuts)
        if not recompute:
            break
        try:
            needed = peak(method, cuts, recompute)
        except PartitionError as error:  # its blocks cannot be called one by one
            unrecomputed = f". Blocks are not recomputed, since {error}"
            break
        if needed <= limit:
            return cuts, recompute
        smallest = min(smallest, needed)
    raise ConfigError(
        f"cuts.fits({memory!r}): no way of cutting {type(model).__name__} for {method.name} fits {batch_size} images; "
        f"the smallest needs {size(smallest)}, of which {headroom:.0%} more are left free. Use a smaller batch_size "
        "(with localgrad.methods.accumulation), or see localgrad.plan(...) for every way there is" + unrecomputed
    )


def _check(batch_size: int, image_size: int, channels: int, headroom: float, optimizer: str, precision: str) -> None:
    for name, value, least in (("batch_size", batch_size, 2), ("image_size", image_size, 1), ("channels", channels, 1)):
        if value < least:
            raise ConfigError(f"{name}={value}; it must be at least {least}")
    if not 0 <= headroom < 1:
        raise ConfigError(f"headroom={headroom}; write a share of the memory, at least 0 and below 1, such as 0.1")
    for name, choice, known in (("optimizer", optimizer, STATES), ("precision", precision, PRECISIONS)):
        if choice not in known:
            raise ConfigError(nearest(choice, known, name))


def _created(name: str, num_classes: int, channels: int, image_size: int) -> nn.Module:
    settings: dict[str, Any] = {"num_classes": num_classes, "in_channels": channels, "image_size": image_size}
    try:
        with torch.device("meta"):
            return models.create(name, **settings)
    except (ConfigError, NotImplementedError):  # it computes something while it is built; or there is none by this name
        return models.create(name, **settings)


class _Ways:
    """Tries one way to train after the other."""

    def __init__(
        self,
        planner: Planner,
        task: Any,
        local: Method,
        text: str,
        optimizer: str,
        budget: int | None,
        headroom: float,
    ) -> None:
        self.planner, self.local, self.text = planner, local, text
        self.e2e = methods.e2e(task)
        self.states = STATES[optimizer]
        self.limit = None if budget is None else budget * (1 - headroom)
        self.plain: Predicted | None = None
        self.options: list[Option] = []
        self.skipped: list[str] = []
        self.separable = True  # whether blocks can be called one by one, as those must that are recomputed

    def all(self) -> tuple[list[Option], list[str]]:
        """Every way, plain training first, and what was left out with the reason."""
        base = "localgrad.methods.e2e(task)"
        whole = self.planner.network(self.e2e, ())
        self.add("plain", "plain", whole, self.e2e, base)
        self.in_backward(whole, self.e2e)
        self.accumulated("accumulation", "accumulation", whole, self.e2e, base, least=3)
        checkpointing = methods.checkpointing(self.e2e)
        recomputing = f"localgrad.methods.checkpointing({base})"
        by_blocks: dict[int, LocalNetwork] = {}
        for k in self.counts():
            names = [cut.name for cut in self.planner.cuts(k, self.e2e)]
            try:
                by_blocks[k] = self.planner.network(checkpointing, names)
            except PartitionError as error:
                self.separable = False
                self.skipped.append(f"checkpointing, and units recomputed: {error}")
                break
            self.add(f"checkpointing K={k}", "checkpointing", by_blocks[k], checkpointing, recomputing)
            self.in_backward(by_blocks[k], checkpointing)
        if by_blocks:
            k = self.leanest("checkpointing").num_blocks
            label = f"checkpointing K={k}, accumulation"
            self.accumulated(label, "checkpointing", by_blocks[k], checkpointing, recomputing, least=0)
        for k in self.counts():
            self.try_local(k)
        if any(option.kind == "local" for option in self.options):
            leanest = self.leanest("local")
            again = leanest.recompute
            self.recompute_heads(leanest)
            network = self.planner.network(self.local, leanest.cuts, again)
            label = f"local K={leanest.num_blocks}" + ", units recomputed" * bool(again) + ", accumulation"
            self.accumulated(label, "local", network, self.local, self.text, least=1, recompute=again)
            self.offloaded()
            self.resident()
        return self.options, self.skipped

    def counts(self) -> list[int]:
        """Numbers of blocks: powers of two, and as many as the model has units."""
        most = len(self.planner.partition.cuts) + 1
        return [*(2**n for n in range(1, 12) if 2**n < most), *([most] if most > 1 else [])]

    def leanest(self, kind: str) -> Option:
        """The option of one kind with the lowest peak."""
        return min((option for option in self.options if option.kind == kind), key=lambda option: option.peak)

    def try_local(self, k: int) -> None:
        """Local learning in ``k`` blocks, as far as the method can be built there."""
        label, planner = f"local K={k}", self.planner
        at_the_end, by_block = (
            tuple(cut.name for cut in planner.cuts(k, self.local, gradients)) for gradients in GRADIENTS
        )
        try:
            network = planner.network(self.local, at_the_end)
            same = at_the_end == by_block
            self.add(label, "local", network, self.local, self.text, per_block=(False, True) if same else (False,))
            if not same:
                network = planner.network(self.local, by_block)
                self.add(label, "local", network, self.local, self.text, per_block=(True,))
            if self.separable and (several := planner.several_units(at_the_end)):
                label += ", units recomputed"
                network = planner.network(self.local, at_the_end, several)
                self.add(label, "local", network, self.local, self.text, recompute=several)
        except (MethodError, PartitionError) as error:
            self.skipped.append(f"{label}: {error}")

    def recompute_heads(self, leanest: Option) -> None:
        """The same with recomputed auxiliary networks, if the method does not do so already."""
        if self.local.recompute.auxiliary:
            return
        method = methods.checkpointing(self.local, where="auxiliary")
        text = f"localgrad.methods.checkpointing({self.text}, where='auxiliary')"
        network = self.planner.network(method, leanest.cuts, leanest.recompute)
        units = ", units recomputed" * bool(leanest.recompute)
        label = f"local K={leanest.num_blocks}{units}, heads recomputed"
        self.add(label, "local", network, method, text, recompute=leanest.recompute)

    def in_backward(self, network: LocalNetwork, method: Method) -> None:
        """The last way, with an optimizer that steps within the backward pass, if that lowers the peak."""
        last = self.options[-1]
        gradients, rest = self.planner.step(network, method, in_backward=True).peak
        name = f"{last.name}, optimizer in backward"
        option = replace(last, name=name, kind="in_backward", gradients=gradients, activations=rest)
        if option.peak < 0.98 * last.peak:
            self.options.append(self.judged(option))

    def accumulated(
        self,
        label: str,
        kind: str,
        network: LocalNetwork,
        method: Method,
        text: str,
        least: int,
        recompute: Sequence[int] = (),
    ) -> None:
        """Accumulation over 2, 4, 8, ... micro-batches: at least so many of them, then until one fits."""
        parts, tried = 2, 0
        while parts <= min(MOST_PARTS, self.planner.batch // 2):
            if tried >= least and (self.limit is None or any(o.fits for o in self.options if o.kind == kind)):
                return
            wrapped = f"localgrad.methods.accumulation({text}, parts={parts})"
            several = methods.accumulation(method, parts=parts)
            self.add(f"{label} x{parts}", kind, network, several, wrapped, recompute=recompute)
            parts, tried = 2 * parts, tried + 1

    def resident(self) -> None:
        """Local learning in as many blocks as there are, each on the device only while it runs; until one way fits."""
        planner, plain = self.planner, self.plain
        assert plain is not None
        cuts = [cut.name for cut in planner.cuts(self.counts()[-1], self.local, "own")]
        network = planner.network(self.local, cuts)
        parts = 1
        while parts <= min(MOST_PARTS, max(1, planner.batch // 2)):
            method = methods.accumulation(self.local, parts=parts) if parts > 1 else self.local
            text = f"localgrad.methods.accumulation({self.text}, parts={parts})" if parts > 1 else self.text
            visits = planner.visits(network, method, self.states)
            moved = visits.fetched + visits.written
            copies = traffic(moved, visits.alone, visits.seconds, plain.seconds, planner.rates)
            gradients, rest = visits.peak
            option = Option(
                name=f"resident K={network.num_blocks}" + f", accumulation x{parts}" * (parts > 1),
                kind="resident",
                method=text,
                cuts=tuple(cuts),
                recompute=(),
                micro_batches=parts,
                per_block=True,
                weights=visits.kept + visits.weights,
                optimizer=visits.state,
                gradients=gradients,
                activations=rest - visits.weights - visits.state,
                flops_ratio=visits.flops / plain.flops,
                time_ratio=copies.time,
                update=LOCAL,
                traffic=copies,
            )
            self.options.append(self.judged(option))
            if self.options[-1].fits is not False:
                return
            parts *= 4

    def offloaded(self) -> None:
        """What others move to the host, on top of plain training and of the leanest checkpointing."""
        planner, plain = self.planner, self.plain
        assert plain is not None
        ways = [self.options[0]]
        if any(option.kind == "checkpointing" for option in self.options):
            ways.append(self.leanest("checkpointing"))
        finest = planner.network(self.e2e, [cut.name for cut in planner.cuts(self.counts()[-1], self.e2e)])
        unit = max(sum(p.nbytes for p in finest.parameters_of(k)) for k in range(finest.num_blocks))
        for option in ways:
            waiting = planner.waiting(option.cuts) // option.micro_batches
            computing = option.time_ratio * plain.seconds
            for name, differing, moved, alone in exact_ways(option, plain.trained, plain.weights, unit, waiting):
                times = option.micro_batches if "FSDP2" in name or "checkpoints" in name else 1
                copies = traffic(times * moved, alone, computing, plain.seconds, planner.rates)
                made = replace(
                    option, name=option.name + name, kind="offloaded", time_ratio=copies.time, traffic=copies,
                    **differing,
                )  # fmt: skip
                self.options.append(self.judged(made))

    def judged(self, option: Option) -> Option:
        """The option, and whether it fits."""
        return replace(option, fits=None if self.limit is None else option.peak <= self.limit)

    def add(
        self,
        name: str,
        kind: str,
        network: LocalNetwork,
        method: Method,
        text: str,
        per_block: Sequence[bool] = (False, True),
        recompute: Sequence[int] = (),
    ) -> None:
        """Predict one way, stepping at the end and block by block.

        Where they do not lower the peak, the step by block and recomputing units are left out.
        """
        parts, step = method.micro_batches, self.planner.step(network, method)
        self.plain = self.plain or step
        update = LOCAL if kind == "local" else MICRO if parts > 1 and step.batchnorm else EXACT
        cuts = tuple(cut.name for cut in network.cuts)
        for by_block in per_block:
            gradients, rest = step.per_block if by_block else step.peak
            option = Option(
                name=name + ", per-block step" * by_block,
                kind=kind,
                method=text,
                cuts=cuts,
                recompute=tuple(recompute),
                micro_batches=parts,
                per_block=by_block,
                weights=step.weights,
                optimizer=self.states * step.trained,
                gradients=gradients,
                activations=rest,
                flops_ratio=step.flops / self.plain.flops,
                time_ratio=step.seconds / self.plain.seconds,
                update=update,
            )
            same = (o for o in self.options if (o.kind, o.num_blocks, o.micro_batches) == (kind, len(cuts) + 1, parts))
            known = min((o.peak for o in same), default=math.inf)
            if (by_block and kind != "local") or ((by_block or recompute) and option.peak >= 0.98 * known):
                continue
            self.options.append(self.judged(option))
