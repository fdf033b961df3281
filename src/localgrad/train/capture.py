"""Whole training steps as CUDA graphs: no Python and no kernel launches between their kernels."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from localgrad.errors import TrainingError
from localgrad.method import Context, Method
from localgrad.network import LocalNetwork
from localgrad.randomness import Draws
from localgrad.state import Place, places
from localgrad.train.meters import Meter

# Inputs of ever new shapes would fill the memory with graphs; steps of further kinds run as they are.
MOST_GRAPHS = 8

# Records work without running it, generators being those it draws from: the call that replays it, and what it returned.
Record = Callable[[Callable[[], Any], Sequence[torch.Generator]], tuple[Callable[[], None], Any]]


class CudaRecord:
    """Records as CUDA graphs, one after the other in the same memory: what they leave behind lies elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, work: Callable[[], Any], generators: Sequence[torch.Generator]
    ) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # Whatever torch makes of a recording that fails, this leaves its stream. Loaders may use the device meanwhile.
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    result = work()
            except BaseException:
                # The generator may take itself for one that still records.
                default = torch.cuda.default_generators[torch.cuda.current_device()]
                default.graphsafe_set_state(default.clone_state())
                raise
        return graph.replay, result


@dataclass
class _Kind:
    """Steps that do the same work on batches of one form."""

    draws: Draws
    reason: str
    calls: int = 0
    static: list[Any] = field(default_factory=list)  # the batch that a replay reads
    replay: Callable[[], None] | None = None
    result: Any = None
    counted: Any = None  # of its meter, before and after a step


class Captured:
    """``step(number, *batch)`` as a CUDA graph, one for each kind of step; each call is one step.

    Steps are of one kind if the method does the same in them (`localgrad.method.Method.work`) and their batches have
    the same form. Of each kind the first calls run as they are, so that libraries choose their kernels and optimizers
    make their state; the next one is recorded, and it and the later ones are replayed. What the step returns is
    overwritten by the next one. Draws keyed by `localgrad.keyed_randomness` are those of steps that run as they are.

    Steps of a kind that cannot be recorded go on as they are: those that wait for the device (``.item()``), draw on the
    host, put another value where a module keeps its own, or have a loss whose code reads ``batch.step``. ``reason``
    tells the first such cause. What no check finds: a rule or context of your own, or what a loss calls, that computes
    in Python from the number of the step what `Method.work` does not tell, and counters elsewhere than in modules.

    Learning rates must be tensors on the device, and a step must end with ``zero_grad(set_to_none=True)``. Elsewhere
    than on CUDA a warning says so, and every call runs as it is.

    Args:
        network: what the step trains.
        step: the work on the device: losses, backward passes, optimizer, `localgrad.exchange`.
        insist: raise instead of going on as it is.
        warm_up: calls of each kind that run as they are.
        meter: what the step counts on the host, in which replays are counted too.
        record: how work is recorded; only tests need another way.

    Raises:
        TrainingError: steps cannot be recorded, and it is to ``insist``.

    Example:
        >>> import torch, localgrad
        >>> from localgrad.train.capture import Captured
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> network = localgrad.localize(model, method, 2, example=x)
        >>> def step(number, x, y):
        ...     localgrad.backward(network, x, y, number)  # then the optimizer
        >>> captured = Captured(network, step, record=lambda work, generators: (lambda: None, work()))
        >>> for number in range(5):
        ...     captured(number, x, y)
        >>> str(captured)
        '1 CUDA graph, 2 of 5 steps replayed'
    """

    def __init__(
        self,
        network: LocalNetwork,
        step: Callable[..., Any],
        *,
        insist: bool = False,
        warm_up: int = 3,
        meter: Meter | None = None,
        record: Record | None = None,
    ) -> None:
        self.network, self.step, self.insist, self.warm_up, self.meter = network, step, insist, warm_up, meter
        self.kinds: dict[Hashable, _Kind] = {}
        self.steps = self.replayed = 0
        self.reason = ""
        self.unfit = self._heeded(unfit(network.method))
        device = network.device
        self.stream: torch.cuda.Stream | None = None
        if record is None and device.type == "cuda":
            record = cuda = CudaRecord(device)
            self.stream = cuda.stream
        elif record is None:
            warnings.warn(
                f"a step is captured as a CUDA graph on a CUDA device only; on the {device} it runs as it is",
                stacklevel=2,
            )
        self.record = record

    def __str__(self) -> str:
        graphs = sum(kind.replay is not None for kind in self.kinds.values())
        said = f"{graphs} CUDA graph{'s' * (graphs != 1)}, {self.replayed:,} of {self.steps:,} steps replayed"
        return f"{said}; others run as they are, as a step {self.reason}" if self.reason else said

    def __call__(self, number: int, *batch: Any) -> Any:
        """Step ``number``."""
        self.steps += 1
        leaves, structure = tree_flatten(batch)
        kind = self._kind(number, str(structure), leaves)
        if kind is None or kind.reason:
            return self.step(number, *batch)
        kind.calls += 1
        if kind.calls <= self.warm_up:
            return self._watched(kind, number, batch)
        kind.draws.seed(number)
        first = kind.replay is None
        if first and not self._recorded(kind, number, leaves, structure):
            return self.step(number, *batch)
        assert kind.replay is not None
        for static, leaf in zip(kind.static, leaves, strict=True):
            if isinstance(static, Tensor):
                static.copy_(leaf)
        kind.replay()
        self.replayed += 1
        if self.meter is not None and not first:
            self.meter.count_again(*kind.counted)
        return kind.result

    def _kind(self, number: int, structure: str, leaves: list[Any]) -> _Kind | None:
        """What kind a step is of; None for one too many, or where nothing is recorded."""
        if self.record is None:
            return None
        name = self.network.method.work(self.network.num_blocks, number), structure, *map(_form, leaves)
        if name not in self.kinds and len(self.kinds) < MOST_GRAPHS:
            self.kinds[name] = _Kind(Draws(self.network.device), self.unfit)
        return self.kinds.get(name)

    def _watched(self, kind: _Kind, number: int, batch: tuple[Any, ...]) -> Any:
        """Run as it is, on the stream that is to be recorded, which keeps its memory; the last time look closely."""
        device = self.network.device
        if kind.calls < self.warm_up:
            with _inside(self.stream), kind.draws.watched():
                return self.step(number, *batch)
        before = dict(places(self.network))
        with _synchronisations(device) as waited, _inside(self.stream), kind.draws.watched():
            result = self.step(number, *batch)
        kind.reason = self._heeded(_why_not(kind.draws, waited, before, dict(places(self.network))))
        return result

    def _recorded(self, kind: _Kind, number: int, leaves: list[Any], structure: TreeSpec) -> bool:
        """Record a kind of step; whether that went well."""
        assert self.record is not None
        kind.static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        batch = tree_unflatten(kind.static, structure)
        before = None if self.meter is None else self.meter.counts()
        try:
            with kind.draws.recorded_step():
                generators = list(kind.draws.generators.values())
                kind.replay, kind.result = self.record(lambda: self.step(number, *batch), generators)
        except Exception as error:  # whatever a step may do that a graph cannot
            self.network.zero_grad(set_to_none=True)  # these gradients were never computed
            kind.static = []
            if self.meter is not None and before is not None:
                self.meter.recount(before)  # the same step runs once more, as it is
            kind.reason = self._heeded(
                f"cannot be recorded: {next(iter(str(error).splitlines()), type(error).__name__)}"
            )
        kind.counted = before, None if self.meter is None else self.meter.counts()
        return kind.replay is not None

    def _heeded(self, reason: str) -> str:
        """Note why steps run as they are; an error where that is not wanted."""
        if reason and self.insist:
            raise TrainingError(f"train.capture=true, but a step {reason}; write train.capture=auto or false")
        self.reason = self.reason or reason
        return reason


def unfit(method: Method) -> str:
    """Why no step of a method can be recorded; nothing where only running it can tell."""
    if method.accumulate.parts > 1 and method.accumulate.wait != "device":
        return "lets features wait on the host"
    losses = (method.task.loss, method.final_loss, *(term.loss for term in method.terms))
    reading = next((code for loss in losses for code in _codes(loss) if "step" in code.co_names), None)
    return "" if reading is None else f"has a loss that reads batch.step ({reading.co_qualname})"


def _codes(function: Any) -> Iterator[CodeType]:
    """What runs when a loss is called: its own code, and that of functions it was made of; contexts tell by `rests`."""
    if isinstance(function, Context):
        return
    if isinstance(function, functools.partial):
        yield from _codes(function.func)
    elif isinstance(function, FunctionType):
        yield function.__code__
    elif isinstance(function, MethodType):
        yield function.__func__.__code__
        yield from _codes(function.__self__)
    elif isinstance(function, nn.Module):
        yield type(function).forward.__code__
    else:
        if callable(function) and isinstance(type(function).__call__, FunctionType):
            yield type(function).__call__.__code__
        for value in vars(function).values() if is_dataclass(function) else ():
            yield from _codes(value)


def _form(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, Hashable) else id(leaf)


def _why_not(draws: Draws, waited: list[str], before: dict[Place, Any], after: dict[Place, Any]) -> str:
    """Why a step that has run as it is cannot be recorded; nothing if it seems that it can."""
    if draws.on_host:
        return "draws random numbers on the host, which a graph does not repeat"
    if waited:
        return f"waits for the device ({waited[0]})"
    changed = next((place for place, value in after.items() if not _same(before.get(place), value)), None)
    if changed is not None:
        return f"puts another value into {type(changed[0]).__name__}.{changed[2]}, which a graph does not repeat"
    return ""


def _same(old: Any, new: Any) -> bool:
    with contextlib.suppress(Exception):  # whatever == does between two values of somebody's module
        return old is new or (not isinstance(new, Tensor) and bool(old == new))
    return False


@contextlib.contextmanager
def _inside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    outside = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


@contextlib.contextmanager
def _synchronisations(device: torch.device) -> Iterator[list[str]]:
    """Where the host waits for a CUDA device inside it, filled on exit."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for one in caught:
        if "synchronizing CUDA operation" in str(one.message):
            found.append(f"{Path(one.filename).name}, line {one.lineno}")
        elif "debug mode is a prototype" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
