"""Whole training steps of one model by many ways, in turn: memory, time, FLOPs, and which way is worth it.

A step is forward, backward, optimizer and exchange, on random images. Its memory is weights, optimizer state and the
most that lives above them.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from localgrad import cuts, models
from localgrad.costs import Cost, cost, cost_of
from localgrad.cutting import as_cutting
from localgrad.engine import local_losses
from localgrad.errors import ConfigError, MethodError, PartitionError, TrainingError
from localgrad.localization import localize
from localgrad.measure.memory import Memory, held_bytes
from localgrad.measure.process_memory import peak_growth, storages_mapped
from localgrad.measure.timing import clock_of, in_turns
from localgrad.named import is_named
from localgrad.network import LocalNetwork, exchange
from localgrad.partition import Partition
from localgrad.planning import EXACT, LOCAL, MICRO
from localgrad.planning.planner import several_units
from localgrad.residence import resident
from localgrad.study.contest_report import Contest, Row
from localgrad.study.ways import Way
from localgrad.train.experiment import explained
from localgrad.train.optim import Stepper

Balance = Literal["count", "bytes"]


class _Contestant:
    """A way with a model, optimizers and a batch: ready to step."""

    def __init__(self, way: Way, model: nn.Module, inputs: Tensor, targets: Tensor, balance: Balance) -> None:
        self.way, self.inputs, self.targets = way, inputs, targets
        # Modules are compiled in place, and some ways leave hooks, which others run without.
        if way.has("compile") or way.in_backward or way.resident or is_named(way.optimizer):
            model = copy.deepcopy(model)
        self.network = network = _cut(way, model, inputs[:2], balance, len(inputs)).train()
        if way.has("channels_last"):
            network.to(memory_format=torch.channels_last)
        if way.has("compile"):
            network.compile_blocks(backend=_compiler(*way.budgets))
        self.activations = None
        if way.resident:  # whose copies of weights and state would count as activations
            self.activations = cost(network, inputs, targets, way.autocast).activation_bytes
            resident(network, inputs.device)
        self.stepper = Stepper(network, way.optim, torch.amp.GradScaler(inputs.device.type, enabled=False))

    def step(self) -> None:
        """One step, after which there are no gradients."""
        losses = local_losses(
            self.network,
            self.inputs,
            self.targets,
            autocast=self.way.autocast,
            on_block_done=self.stepper.block_done,
        )
        away = torch.autograd.graph.save_on_cpu(pin_memory=self.inputs.is_cuda) if self.way.offload else None
        with away or contextlib.nullcontext():
            for _, loss in losses:
                loss.backward()
        self.stepper.finish(0)
        exchange(self.network)

    def gradients(self) -> str:
        """What the gradients of training are, compared with back-propagation through the whole network."""
        patterns = self.network.method.spans.patterns(self.network.num_blocks)
        if any(span.start > 0 for pattern in patterns for span in pattern):
            return LOCAL
        normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.network.modules())
        return MICRO if self.network.method.micro_batches > 1 and normed else EXACT

    def row(self, timeline: bool) -> Row:
        """Everything but the times, from the second step: in the first the optimizer makes its state."""
        try:
            self.step()
        except torch._dynamo.exc.TorchDynamoException as error:
            raise TrainingError(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
        network, device = self.network, self.inputs.device
        staying = [*network.parameters(), *network.buffers()]
        state: Any = [one.state_dict() for one in self.stepper.optimizers]
        if network.residence is not None:
            staying = network.residence.kept
            state = [one.state[p] for one in self.stepper.optimizers for p in staying if p in one.state]
        found: Cost | None = None
        ops: tuple[tuple[float, int, int, int], ...] = ()
        if self.way.has("compile"):
            peak = peak_growth(self.step, device)
        else:
            seen: list[tuple[Cost, Memory]] = []
            with _Moments(network) as moments:
                peak = peak_growth(lambda: seen.append(cost_of(network, self.step, timeline)), device)
            ((found, memory),) = seen
            if timeline:
                alive = zip(moments.seconds, memory.timeline, moments.visiting, strict=True)
                ops = tuple((at, *live, here) for at, live, here in alive)
        return Row(
            name=self.way.name,
            kind=self.way.kind,
            method=self.way.method.name,
            variant=self.way.variant,
            optimizer=self.way.optimizer,
            gradients=self.gradients(),
            num_blocks=network.num_blocks,
            cuts=tuple(cut.name for cut in network.cuts),
            weight_bytes=held_bytes(staying, device),
            state_bytes=held_bytes(state, device),
            activation_bytes=self.activations or (None if found is None else found.activation_bytes),
            total_bytes=None if found is None else found.total_bytes,
            peak_bytes=peak,
            flops=None if found is None else found.flops,
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
    """When each op was done, in seconds since the first one began, and what of a resident network was there then."""

    def __init__(self, network: LocalNetwork) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.network = network
        self.seconds: list[float] = []
        self.visiting: list[int] = []
        self.start: float | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.start = time.process_time() if self.start is None else self.start
        result = func(*args, **(kwargs or {}))
        self.seconds.append(time.process_time() - self.start)
        self.visiting.append(0 if self.network.residence is None else self.network.residence.here)
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

    All ways train the same weights, so that a step of one is as costly whatever the others did; compiled ones, and
    those by optimizers of other libraries, a copy. A way that cannot be is left out with the reason.

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
            progress(f"memory of {way.label}")
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
            except (ConfigError, MethodError, PartitionError, TrainingError) as error:
                if not contestants or (isinstance(error, PartitionError) and not way.separate):
                    raise
                skipped.append(f"{way.label}: {error}")
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
