"""A step without data, run by the engine on fake tensors: every operation with shapes, strides and devices.

Fake tensors rather than tensors on the meta device because they know which device they stand for: on meta, fused
attention falls back to the form that keeps the attention matrix, and autocast does nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from localgrad import cutting
from localgrad.batches import tensors_in
from localgrad.cutting import auxiliary_bytes
from localgrad.engine import local_losses
from localgrad.errors import ConfigError
from localgrad.localization import localize
from localgrad.measure.memory import LiveBytes
from localgrad.measure.work import Rates, Work
from localgrad.method import Accumulate, Method
from localgrad.network import LocalNetwork
from localgrad.partition import AuxiliaryBytes, Cut, Partition, by_bytes
from localgrad.partition.choose import Held, features_at, unit_storages
from localgrad.residence import Residence
from localgrad.spans import groups
from localgrad.task import Task
from localgrad.tasks import classification

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


class _Shapes(TorchFunctionMode):
    """Tensors without data are equal if their shapes are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.equal:
            return args[0].shape == args[1].shape
        return func(*args, **(kwargs or {}))


class _Emptied(TorchFunctionMode):
    """A deep copy of a tensor is what ``empty`` makes of it."""

    def __init__(self, empty: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.empty = empty

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.empty(args[0]) if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def _without_data(module: nn.Module, empty: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy in which every tensor is what ``empty`` makes of it; no data is copied."""
    memo: dict[int, Any] = {id(p): nn.Parameter(empty(p), p.requires_grad) for p in module.parameters()}
    with _Emptied(empty):
        return copy.deepcopy(module, memo)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@dataclass
class Predicted:
    """What one step was found to need, bytes and seconds.

    Args:
        weights: of parameters and buffers; ``trained`` of those that get a gradient.
        tracked: the most that was alive at once in forward and backward, above weights and batch.
        peak: gradients and everything else at the fullest moment, batch and optimizer step included; ``per_block``
            the same where every block steps as soon as it is done.
        flops: 2 per multiply-add; ``seconds`` predicted from them and the traffic.
        batchnorm: whether some layer normalises over the batch.
    """

    weights: int
    trained: int
    tracked: int
    peak: tuple[int, int]
    per_block: tuple[int, int]
    flops: int
    seconds: float
    batchnorm: bool


class Visits(NamedTuple):
    """What a step of a resident network was found to need.

    Args:
        kept: bytes of weights that stay on the device, and of their state.
        weights, state: those of the blocks that are there, and come, where they hold most.
        peak: gradients and everything else that comes and goes at the fullest moment, batch included.
        fetched, written: bytes over the link in a step; ``alone`` those of them that nothing hides, of the first block
            and of the last.
        flops, seconds: as of `Predicted`, copies left out.
    """

    kept: int
    weights: int
    state: int
    peak: tuple[int, int]
    fetched: int
    written: int
    alone: int
    flops: int
    seconds: float


class _Stepping(torch.optim.Optimizer):
    """An optimizer that computes nothing: it keeps ``states`` copies of its parameters.

    It steps one after the other, and has three copies of one of them meanwhile, as AdamW on a CPU (fused: none).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], states: int) -> None:
        super().__init__(parameters, {})
        for parameter in parameters:
            self.state[parameter] = {f"state {k}": torch.zeros_like(parameter) for k in range(states)}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        stepped = [parameter for parameter in self.state if parameter.grad is not None]
        copies = [torch.empty_like(max(stepped, key=Tensor.numel)) for _ in range(3) if stepped]
        copies.clear()


class Planner:
    """A model without data, its cut points, and what steps of it cost.

    Args:
        model: on any device; left as it is.
        shape: of one sample, (C, H, W) for images.
        batch: samples in a step.
        precision: ``fp32``, or ``bf16`` for autocast.
        rates: of the device that will train.
        task: what is trained; None for classification in as many classes as the model answers with.
        targets: of any number of samples, for a task that has no method ``blank``.

    Raises:
        ConfigError: no task and a model that is no classifier, or no targets.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        batch: int,
        precision: str,
        rates: Rates,
        task: Task | None = None,
        targets: Any = None,
    ) -> None:
        self.device = next(model.parameters()).device
        if self.device.type == "meta":
            self.device = torch.device("cpu")
        self.batch, self.shape, self.rates = batch, shape, rates
        self.autocast = PRECISIONS[precision]
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = _without_data(model, _on_meta)
        self.dtype = next(model.parameters()).dtype
        self.example = torch.empty(2, *shape, device="meta", dtype=self.dtype)
        with _Shapes(), torch.device("meta"):
            self.partition = Partition(self.model, self.example)
            self.task = classification(self._classes()) if task is None else task
        self.targets = targets
        with _Shapes():
            self.saved = self._saved()
        self._heads: tuple[Method | None, dict[Cut, AuxiliaryBytes]] = (None, {})

    def _classes(self) -> int:
        with torch.no_grad():
            output = self.model(self.example)
        if not isinstance(output, Tensor) or output.dim() != 2:
            raise ConfigError(
                f"plan: {type(self.model).__name__} returns {_described(output)} and is no classifier, which returns "
                "(B, num_classes); write what it is trained to do, such as task=localgrad.tasks.segmentation(21)"
            )
        return int(output.shape[1])

    def _fake(self, tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)

    def _saved(self) -> list[dict[int, int]]:
        """What each unit saves for backward, on fake tensors: the meta device would save attention matrices."""
        with self.mode:
            fake = copy.copy(self.partition)
            fake.model = _without_data(self.model, self._fake)
            fake.example = torch.empty(2, *self.shape, device=self.device, dtype=self.dtype)
            return unit_storages(fake)

    def largest_unit(self) -> tuple[int, str]:
        """Bytes at the batch size, and the path of the unit that saves them."""
        totals = [sum(unit.values()) for unit in self.saved]
        index = totals.index(max(totals))
        name = self.partition.cuts[index - 1].name if index else "the stem"
        return totals[index] * self.batch // 2, name

    def cuts(self, num_blocks: int, method: Method, gradients: Held = "earlier") -> tuple[Cut, ...]:
        """Where to cut so that the largest block needs least, its auxiliary network included.

        ``gradients`` as for `localgrad.partition.by_bytes`; without auxiliary networks only activations count.
        """
        if not method.terms:
            return by_bytes(self.partition, num_blocks, None, self.saved)
        known, heads = self._heads
        if known is not method:
            with _Shapes(), torch.device("meta"):
                measured = auxiliary_bytes(method, self.partition, num_blocks)
                heads = {cut: measured(cut) for cut in self.partition.cuts}
            self._heads = method, heads
        share = len(self.example) / self.batch
        return by_bytes(self.partition, num_blocks, heads.__getitem__, self.saved, gradients=gradients, share=share)

    def several_units(self, cuts: Sequence[str]) -> tuple[int, ...]:
        """Indices of the blocks that consist of several units, and so can be recomputed unit by unit."""
        return several_units(self.partition, self.partition.named(cuts))

    def network(self, method: Method, cuts: Sequence[str], recompute: Sequence[int] = ()) -> LocalNetwork:
        """The model cut up, without data; raises `PartitionError` if it has no separate blocks to recompute."""
        where: Any = tuple(cuts) or 1
        where = cutting.recomputed(where, tuple(recompute)) if recompute else where
        with _Shapes(), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of blocks that are cut badly: others are tried beside them
            return localize(self.model, method, where, example=self.example)

    def waiting(self, cuts: Sequence[str]) -> int:
        """Bytes of the features between the blocks, of the whole batch."""
        with _Shapes(), torch.device("meta"):
            found = features_at(self.partition, self.partition.named(cuts))
        return sum(features.nbytes for features in found) * self.batch // len(self.example)

    def _targets(self, samples: int) -> Any:
        if self.targets is not None:
            return _repeated(self.targets, samples)
        blank = getattr(self.task, "blank", None)
        if blank is None:
            raise ConfigError(
                f"planning a {type(self.task).__name__}: it is not known what its targets look like; give some, "
                "targets=y[:2]"
            )
        return blank(samples, self.shape)

    def step(self, network: LocalNetwork, method: Method, in_backward: bool = False) -> Predicted:
        """Run a step by ``method``, which puts the same heads on ``network`` as its own does.

        Of several micro-batches two are run: in the second one there are gradients to add to. For each of the others
        what waits at the boundary, where it is largest, is added.

        Args:
            network, method: as above.
            in_backward: each parameter steps, and frees its gradient, as soon as that is there.

        Raises:
            ConfigError: the loss decides by values, which there are none of.
        """
        try:
            return self._step(network, method, in_backward)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"planning a {type(self.task).__name__}: its loss, or the model, decides by values ({error}), and "
                "planning runs on tensors without values; cut by localgrad.cuts.by_bytes(...), and measure a step by "
                "localgrad.costs.cost"
            ) from error

    def visits(self, network: LocalNetwork, method: Method, states: int) -> Visits:
        """Run a step in which blocks come to the device one by one and step there, as `step` does.

        Args:
            network, method: as for `step`.
            states: copies of the parameters that the optimizer keeps.
        """
        with self.mode:
            network, x, y, images = self._ready(network, method)
            residence = network.residence = Residence(network, self.device)
            residence.settle()
            optimizers = [_Stepping(network.block_parameters(k), states) for k in range(network.num_blocks)]
            for optimizer in optimizers:
                residence.follow(optimizer)
            blocks = [list(residence.tensors_of(k)) for k in range(network.num_blocks)]
            back = [[t for t in block if t.requires_grad or not isinstance(t, nn.Parameter)] for block in blocks]
            trained = [p for p in network.parameters() if p.requires_grad]
            work, tracker = Work(self.rates), LiveBytes(trained)
            done: list[_Done] = []

            def step(block: int) -> None:
                live = tracker.current - residence.here
                done.append(_Done(block, len(tracker.timeline), live, tracker.gradients))
                optimizers[block].step()
                optimizers[block].zero_grad()

            with tracker, work:
                for _, loss in local_losses(network, x, y, autocast=self.autocast, on_block_done=step):
                    loss.backward()
                del loss
            each = [_size(list(residence.tensors_of(k, training=False))) for k in range(network.num_blocks)]
            kept = _size(residence.kept) + states * _size([t for t in residence.kept if t.requires_grad])
        timeline = self._waited(tracker.timeline, done, network, method)
        live, gradients = max(timeline)
        given = _size([x, *tensors_in(y)]) * self.batch // images
        peak = (gradients, live - gradients + given)
        sizes = [_size(block) for block in blocks]
        fullest = max(range(len(blocks)), key=lambda k: sum(sizes[k : k + 2]))
        weights = sum(each[fullest : fullest + 2])
        # What is predicted for the copies as operations of the device; they run beside its own.
        copied = (2 * residence.fetched + 3 * residence.written) / self.rates.bytes
        copied += self.rates.start * sum(map(len, (*blocks, *back)))
        share = self.batch / images
        return Visits(
            kept=kept,
            weights=weights,
            state=sum(sizes[fullest : fullest + 2]) - weights,
            peak=peak,
            fetched=residence.fetched,
            written=residence.written,
            alone=sizes[0] + _size(back[-1]),
            flops=round(work.flops * share),
            seconds=(work.seconds - copied) * share,
        )

    def _ready(self, network: LocalNetwork, method: Method) -> tuple[LocalNetwork, Tensor, Any, int]:
        """The network to run on fake tensors, with at most two micro-batches, their inputs, targets and images."""
        parts = method.micro_batches
        images = self.batch if parts == 1 else 2 * -(-self.batch // parts)
        network = _without_data(network, self._fake)
        network.method = replace(method, accumulate=Accumulate(min(parts, 2), method.accumulate.wait))
        network.train()
        x = torch.empty(images, *self.shape, device=self.device, dtype=self.dtype)
        with torch.device(self.device):
            y = self._targets(images)
        return network, x, y, images

    def _waited(
        self, timeline: list[tuple[int, int]], done: Sequence[_Done], network: LocalNetwork, method: Method
    ) -> list[tuple[int, int]]:
        """The timeline with what waits of the micro-batches that were not run."""
        if method.micro_batches <= 2:
            return timeline
        lasts = {group[-1] for group in groups(network.spans(0), network.num_blocks)}
        return _with_waiting(timeline, [one for one in done if one.block in lasts], method.micro_batches)

    def _step(self, network: LocalNetwork, method: Method, in_backward: bool) -> Predicted:
        with self.mode:
            network, x, y, images = self._ready(network, method)
            trained = [p for p in network.parameters() if p.requires_grad]
            sizes = [_size(network.block_parameters(k)) for k in range(network.num_blocks)]
            work, tracker = Work(self.rates), LiveBytes(trained)
            done: list[_Done] = []
            for parameter in trained if in_backward else ():
                parameter.register_post_accumulate_grad_hook(_step_alone)

            def note(block: int) -> None:
                done.append(_Done(block, len(tracker.timeline), tracker.current, tracker.gradients))

            with tracker, work:
                for _, loss in local_losses(network, x, y, autocast=self.autocast, on_block_done=note):
                    loss.backward()
                del loss
        timeline = self._waited(tracker.timeline, done, network, method)
        given = _size([x, *tensors_in(y)]) * self.batch // images  # the whole batch waits on the device
        # The optimizer makes one copy of what it steps (torch's multi-tensor SGD with weight decay, and AdamW).
        stepping = (0, 0) if in_backward else (2 * _size(trained), _size(trained))
        whole = max([*timeline, stepping])
        alone, freed, start = [(0, 0)], 0, 0
        for one in done:
            alone += [(live - freed, grads - freed) for live, grads in timeline[start : one.op]]
            alone.append((one.live - freed + sizes[one.block], one.gradients - freed))
            freed, start = freed + sizes[one.block], one.op
        alone += [(live - freed, grads - freed) for live, grads in timeline[start:]]
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
        together, one_by_one = ((grads, live - grads + given) for live, grads in (whole, max(alone)))
        weights, share = _size(_tensors(network)), self.batch / images
        return Predicted(
            weights,
            _size(trained),
            max(live for live, _ in timeline),
            together,
            one_by_one,
            round(work.flops * share),
            work.seconds * share,
            norms,
        )


def _step_alone(parameter: Tensor) -> None:
    """The step of one parameter: a copy of it, and its gradient is freed."""
    torch.empty_like(parameter)
    parameter.grad = None


def _repeated(values: Any, samples: int) -> Any:
    """Targets of so many samples in the form of ``values``."""
    if isinstance(values, list):
        return [values[k % len(values)] for k in range(samples)]
    if isinstance(values, Mapping):
        return {name: _repeated(value, samples) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_repeated(value, samples) for value in values)
    return torch.zeros(samples, *values.shape[1:], dtype=values.dtype)


def several_units(partition: Partition, cuts: Sequence[Cut]) -> tuple[int, ...]:
    """Indices of the blocks between ``cuts`` that hold further cut points, between which they can be recomputed."""
    edges = [0, *(cut.position for cut in cuts), 1 << 62]
    inner = [cut.position for cut in partition.cuts]
    return tuple(k for k, (a, b) in enumerate(pairwise(edges)) if any(a < position < b for position in inner))


class _Done(NamedTuple):
    """A block whose gradients are complete: after how many ops, and what is alive then, gradients among it."""

    block: int
    op: int
    live: int
    gradients: int


def _with_waiting(timeline: Sequence[tuple[int, int]], ends: Sequence[_Done], parts: int) -> list[tuple[int, int]]:
    """The timeline of two micro-batches with what would wait of the other ``parts - 2``.

    Args:
        timeline: (live bytes, gradients among them) after each op.
        ends: when both micro-batches have passed each group of blocks; what is alive there but gradients waits.
    """
    found: list[tuple[int, int]] = []
    before = 0
    for end in ends:
        after = (end.live - end.gradients) // 2
        extra = (parts - 2) * max(before, after)
        found += [(live + extra, gradients) for live, gradients in timeline[len(found) : end.op]]
        before = after
    return found + list(timeline[len(found) :])


def _size(tensors: Sequence[Tensor]) -> int:
    unique = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
