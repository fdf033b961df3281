"""After training: the first blocks of a network with a head, and a network that answers as soon as a head is sure.

Both are copies of separate blocks (`localgrad.partition.separate`) and of auxiliary heads, in eval mode for good. They
know nothing of training: they are saved, moved and exported as any module.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from localgrad.batches import call_model, num_samples, positional, rows
from localgrad.calibration import Answered, Curve, Outcome, confidence, fitted_temperature
from localgrad.errors import MethodError, PartitionError, TrainingError
from localgrad.losses.precision import widened
from localgrad.measure.work import Rates, Work
from localgrad.method import Auxiliary, Method
from localgrad.partition import Cut, Partition
from localgrad.partition.separate import as_by_now, separate_blocks
from localgrad.partition.trace import INPUTS
from localgrad.partition.units import Called
from localgrad.spans import Span
from localgrad.suspension.untouched import untouched

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Network(Protocol):
    """What is read of a `localgrad.network.LocalNetwork`."""

    model: nn.Module
    method: Method
    cuts: tuple[Cut, ...]

    @property
    def partition(self) -> Partition:
        """The model as it was analysed."""

    @property
    def num_blocks(self) -> int:
        """K."""

    def auxiliaries_at(self, boundary: int) -> list[tuple[Span, Auxiliary]]:
        """Every auxiliary network on one boundary, with its span."""


class _Inference(nn.Module):
    """A module in eval mode for good: what was traced in eval mode is wrong in training mode."""

    def train(self, mode: bool = True) -> Any:
        """Raise `TrainingError` for training mode."""
        if mode:
            raise TrainingError(
                f"{type(self).__name__} is a copy for inference and stays in eval mode; train the network it came from"
            )
        return super().train(False)


class Prefix(_Inference):
    """The first blocks of a model and the auxiliary head behind them; see `LocalNetwork.prefix`."""

    def __init__(self, blocks: nn.Module, head: nn.Module, several: bool) -> None:
        super().__init__()
        self.blocks, self.head, self.several = blocks, head, several

    def forward(self, *inputs: Any) -> Any:
        """What the head answers to inputs of the model."""
        return self.head(self.blocks(inputs if self.several else inputs[0])[0])


class Answers(NamedTuple):
    """What `Exits` answers, in the order of the inputs.

    Args:
        logits: (B, C), of the head that answered, not divided by its temperature; with ``average`` the logarithms of
            the mean probabilities, float32 at least.
        block: (B,) int64, the block behind which that head reads, from 1; K for the model's own.
    """

    logits: Tensor
    block: Tensor


class Exits(_Inference):
    """A network that answers each sample at the first head that is sure enough; see `LocalNetwork.exits`.

    Exit e answers a sample if ``max(p_e) >= t_e``, p_e being ``softmax(z_e / T_e)`` of its logits z_e (C,), or with
    ``average`` the mean of these over exits 1 to e. The last exit, the model's own head with T = 1, answers all that
    are left. Samples that have an answer leave the batch.

    Under `torch.export` and `torch.onnx.export`, whose graphs have no such branches, every exit answers the whole batch
    and the first sure answer is selected: the same answers without the saving.

    Attributes:
        boundaries: the block behind which each exit reads, from 1.
        temperature, threshold: T and t, buffers (E - 1,) for E exits, float32 in whatever the module is cast to.
        block_flops: of a sample, in the blocks up to each exit, 2 per multiply-add, counted on localize's example;
            ``head_flops`` in the head of each exit alone, 0 for the last.

    Source: Teerapittayanon et al., BranchyNet, ICPR 2016, arXiv:1709.01686.
    Differs: sure is who has a large maximum probability, as in Huang et al., ICLR 2018, arXiv:1703.09844, instead of a
    small entropy; probabilities are calibrated by a temperature (Guo et al., ICML 2017, arXiv:1706.04599). Means over
    exits are those of Wolczyk et al., NeurIPS 2021, arXiv:2106.05409, arithmetic and without learned weights.
    """

    temperature: Tensor
    threshold: Tensor

    def __init__(
        self,
        blocks: Sequence[Any],
        heads: dict[int, nn.Module],
        logits: Callable[[Any], Tensor],
        several: bool,
        threshold: float,
        average: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block.eval_graph for block in blocks)
        self.names = [block.names(False) for block in blocks]
        self.heads = nn.ModuleDict({str(boundary): head for boundary, head in heads.items()})
        self.boundaries = (*heads, len(blocks))
        self.logits, self.several, self.average = logits, several, average
        self.register_buffer("temperature", torch.ones(len(heads), dtype=torch.float32))
        self.register_buffer("threshold", torch.full((len(heads),), threshold, dtype=torch.float32))
        self.per_sample: dict[str, tuple[bool, ...]] = {}  # of each value that crosses: which of its leaves have rows
        self.block_flops: tuple[float, ...] = ()
        self.head_flops: tuple[float, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Exits:
        """As of any module, but casts leave out the buffers: half precision would take a threshold of 0.9985 for 1."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, buffer in before.items():
            if (after := self.get_buffer(name)).dtype != buffer.dtype:
                setattr(self, name, buffer.to(after.device))
        return self

    def forward(self, *inputs: Any) -> Answers:
        """Answers to inputs of the model, each by the first exit that is sure."""
        if torch.compiler.is_exporting():
            logits, block = self._selected(self._answers([logits for _, logits in self._every(inputs)]))
            return logits, block  # type: ignore[return-value]  # no class of ours where it is loaded
        samples = torch.arange(num_samples(inputs) or 0, device=self.threshold.device)
        values: dict[str, Any] = {INPUTS: inputs if self.several else inputs[0]}
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        read: list[Tensor] = []  # the logits of every exit so far, of the samples that have no answer
        for index in range(len(self.blocks)):
            features = self._run(index, values)
            if index + 1 not in self.boundaries:
                continue
            read.append(self._read(index, features))
            logits = self._answers(read)[-1]
            sure = self._sure(self.boundaries.index(index + 1), logits)
            if sure.any():
                found.append((samples[sure], logits[sure], torch.full_like(samples[sure], index + 1)))
                if sure.all():
                    break
                samples, values, read = samples[~sure], self._rows(values, ~sure), [one[~sure] for one in read]
        if not found:  # no samples
            found.append((samples, logits, samples))
        order, given, blocks = (torch.cat(parts) for parts in zip(*found, strict=True))
        back = order.argsort()
        return Answers(given[back], blocks[back])

    def _every(self, inputs: tuple[Any, ...]) -> Iterator[tuple[int, Tensor]]:
        """The logits of every exit for the whole batch, each with its boundary."""
        values: dict[str, Any] = {INPUTS: inputs if self.several else inputs[0]}
        for index in range(len(self.blocks)):
            features = self._run(index, values)
            if index + 1 in self.boundaries:
                yield index + 1, self._read(index, features)

    def _answers(self, read: list[Tensor]) -> list[Tensor]:
        """What each exit answers with, (B, C) each, of the logits that its head and those before it read."""
        if not self.average:
            return read
        each = torch.stack([(widened(z) / self._temperature(place)).log_softmax(1) for place, z in enumerate(read)])
        return [each[:count].logsumexp(0) - math.log(count) for count in range(1, len(read) + 1)]

    def _temperature(self, place: int) -> Tensor | float:
        return self.temperature[place] if place < len(self.heads) else 1.0

    def _confidence(self, place: int, answer: Tensor) -> Tensor:
        """The largest probability (B,) of an exit, of what it answers with."""
        return confidence(answer, 1.0 if self.average else self._temperature(place))

    def _selected(self, logits: list[Tensor]) -> Answers:
        answer, block = logits[-1], torch.full_like(logits[-1][:, 0], self.boundaries[-1], dtype=torch.int64)
        for place in reversed(range(len(self.heads))):
            sure = self._sure(place, logits[place])
            answer = torch.where(sure[:, None], logits[place], answer)
            block = torch.where(sure, self.boundaries[place], block)
        return Answers(answer, block)

    def _run(self, index: int, values: dict[str, Any]) -> Any:
        """The features that one block makes of ``values``, which afterwards are those that later blocks read."""
        inputs, outputs = self.names[index]
        made = self.blocks[index](*(values[name] for name in inputs))
        values |= zip(outputs, made, strict=True)
        later = {name for names, _ in self.names[index + 1 :] for name in names}
        for name in values.keys() - later:
            del values[name]
        return made[0]

    def _read(self, index: int, features: Any) -> Tensor:
        last = index + 1 == len(self.blocks)
        return self.logits(features if last else self.heads[str(index + 1)](features))

    def _sure(self, place: int, logits: Tensor) -> Tensor:
        """Which samples (B,) an exit answers."""
        if place == len(self.heads):
            return torch.ones_like(logits[:, 0], dtype=torch.bool)
        return self._confidence(place, logits) >= self.threshold[place]

    def _rows(self, values: dict[str, Any], stay: Tensor) -> dict[str, Any]:
        kept = {}
        for name, value in values.items():
            leaves, form = tree_flatten(value)
            flags = self.per_sample[name]
            kept[name] = tree_unflatten([v[stay] if rows else v for v, rows in zip(leaves, flags, strict=True)], form)
        return kept

    def calibrate(self, batches: Iterable[tuple[Any, Tensor]], points: float = 0.0) -> Outcome:
        """Choose a temperature for each head, and a threshold for all of them, on a validation split.

        A temperature minimises the mean cross-entropy of ``z / T``. The threshold takes the fewest FLOPs of those
        with ``accuracy >= accuracy of the last exit - points / 100`` on this split.

        Args:
            batches: of (inputs, targets), targets class indices (B,) int64: a loader, or ``[(inputs, targets)]``. Not
                those that trained the network, of which its heads are too sure.
            points: percentage points of accuracy that may be lost.

        Returns:
            how the exits do on this split. It chose them: `measure` another one.

        Raises:
            TrainingError: targets of another form, no batch, or negative points.
        """
        logits, targets = self._logits(batches)
        return self._calibrate(logits, targets, points)

    def measure(self, batches: Iterable[tuple[Any, Tensor]]) -> Outcome:
        """How the exits do on a split, as they are."""
        return self._answered(*self._logits(batches)).outcome(self.threshold)

    def curve(
        self,
        validation: Iterable[tuple[Any, Tensor]],
        split: Iterable[tuple[Any, Tensor]],
        points: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0),
    ) -> Curve:
        """Accuracy against compute on ``split``, calibrated on ``validation`` for each of ``points``.

        The exits themselves keep the temperatures and thresholds that they have.
        """
        before = self.temperature.clone(), self.threshold.clone()
        chosen, read = self._logits(validation), self._logits(split)
        outcomes = []
        try:
            for one in points:
                self._calibrate(*chosen, one)
                outcomes.append(self._answered(*read).outcome(self.threshold))
        finally:
            self.temperature.copy_(before[0])
            self.threshold.copy_(before[1])
        heads = self._answered(*read).right.double().mean(1).tolist()
        alone = [blocks + head for blocks, head in zip(self.block_flops, self.head_flops, strict=True)]
        return Curve(self.boundaries, tuple(heads), tuple(alone), tuple(points), tuple(outcomes))

    def _calibrate(self, logits: list[Tensor], targets: Tensor, points: float) -> Outcome:
        if not points >= 0:
            raise TrainingError(f"points={points}; it is how much accuracy may be lost, at least 0, for instance 1.0")
        for place in range(len(self.heads)):
            self.temperature[place] = fitted_temperature(logits[place], targets)
        answered = self._answered(logits, targets)
        self.threshold.copy_(answered.cheapest(points))
        return answered.outcome(self.threshold)

    def _answered(self, logits: list[Tensor], targets: Tensor) -> Answered:
        heads = itertools.accumulate(self.head_flops)
        flops = [blocks + sofar for blocks, sofar in zip(self.block_flops, heads, strict=True)]
        answers = self._answers(logits)
        sure = [self._confidence(place, answer) for place, answer in enumerate(answers[:-1])]
        right = torch.stack([one.argmax(1) == targets for one in answers])
        return Answered(right, torch.stack(sure), torch.tensor(flops, dtype=torch.float64, device=targets.device))

    @torch.no_grad()
    def _logits(self, batches: Iterable[tuple[Any, Tensor]]) -> tuple[list[Tensor], Tensor]:
        """What every exit answers to every sample, (N, C) each, and the targets (N,)."""
        device = self.threshold.device
        answers, wanted = [], []
        for inputs, targets in batches:
            inputs, targets = tree_map_only(Tensor, lambda t: t.to(device), (inputs, targets))
            answers.append([logits for _, logits in self._every(inputs if self.several else (inputs,))])
            samples, classes = answers[-1][-1].shape
            if (
                not isinstance(targets, Tensor)
                or targets.dtype != torch.int64
                or targets.shape != (samples,)
                or not ((targets >= 0) & (targets < classes)).all()
            ):
                raise TrainingError(
                    f"exits are calibrated and measured on class indices ({samples},) of int64, 0 to {classes - 1}; "
                    "leave out samples without a label, and write targets.argmax(1) for probabilities"
                )
            wanted.append(targets)
        if not wanted:
            raise TrainingError("no batch to calibrate or measure exits on: an iterator is used up after one pass")
        return [torch.cat(parts) for parts in zip(*answers, strict=True)], torch.cat(wanted)

    @torch.no_grad()
    def _tried(self, example: Any) -> Exits:
        """Itself, once FLOPs are counted and it is known which values have a row for each sample.

        Raises:
            PartitionError: the last sample of the example alone makes something else than beside the others.
        """
        samples = num_samples(example) or 0
        beside, alone = self._made(example), self._made(rows(example, samples - 1, samples))
        self.block_flops, self.head_flops = (tuple(n / samples for n in each) for each in (beside.blocks, beside.heads))
        for name, value in beside.values.items():
            pairs = list(zip(tree_leaves(value), tree_leaves(alone.values[name]), strict=True))
            flags = [_has_rows(one, other, samples) for one, other in pairs]
            if None in flags:
                one, other = map(_form, pairs[flags.index(None)])
                raise PartitionError(
                    f"exits: {name} is not made sample by sample, so samples with an answer cannot leave the batch: "
                    f"it is {one} in a batch of {samples}, {other} for its last sample alone. A prefix can be used"
                )
            self.per_sample[name] = tuple(flag is True for flag in flags)
        return self

    def _made(self, inputs: Any) -> _Made:
        made = _Made({INPUTS: inputs}, [], [])
        values = dict(made.values)
        with Work(Rates(1.0, 1.0)) as work:
            for index in range(len(self.blocks)):
                features = self._run(index, values)
                made.values.update(values)
                if index + 1 in self.boundaries:
                    made.blocks.append(work.flops - sum(made.heads))
                    made.values[f"the answer behind block {index + 1}"] = self._read(index, features)
                    made.heads.append(work.flops - made.blocks[-1] - sum(made.heads))
        return made


class _Made(NamedTuple):
    """All values that cross boundaries and all answers; FLOPs of the blocks up to each exit, and of each head."""

    values: dict[str, Any]
    blocks: list[int]
    heads: list[int]


def _has_rows(beside: Any, alone: Any, samples: int) -> bool | None:
    """Whether a value has a row for each sample; False if it is the same for any batch, None if it is neither."""
    if not isinstance(beside, Tensor) or not isinstance(alone, Tensor):
        return False if type(beside) is type(alone) and beside == alone else None
    if beside.shape == alone.shape:
        return False if torch.equal(beside, alone) else None
    if beside.shape != (samples, *alone.shape[1:]) or len(alone) != 1:
        return None
    if not beside.is_floating_point():
        return True if torch.equal(beside[-1:], alone) else None
    difference = (beside[-1:] - alone).double().norm()  # kernels for other sizes round otherwise
    return True if difference <= torch.finfo(beside.dtype).eps ** 0.5 * alone.double().norm() else None


def _form(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _head_at(network: Network, boundary: int) -> nn.Module | None:
    """The auxiliary head on a boundary that answers as the model does, its bridge before it; None if there is none.

    Of several, that of the widest span.
    """
    for _, auxiliary in sorted(network.auxiliaries_at(boundary), key=lambda pair: pair[0].start):
        for (term, _), head in zip(auxiliary.terms, auxiliary.heads, strict=True):
            if term.scored:
                return head if auxiliary.bridge is None else nn.Sequential(auxiliary.bridge, head)
    return None


def _copied(module: AnyModule) -> AnyModule:
    """A copy for inference, without the twins' way to the units that they follow."""
    for part in module.modules():
        if isinstance(part, Called) and part.sources:
            raise MethodError(
                f"a head copies {type(part.module).__name__}, which takes more tensors than the features (a mask, "
                "say), and blocks that are called one by one do not have them at hand; choose another bridge or head"
            )
    held = [twins for part in module.modules() if (twins := vars(part).get("twins")) is not None]
    return copy.deepcopy(module, {id(twins): [] for twins in held}).requires_grad_(False).eval()


def _several(network: Network) -> bool:
    return isinstance(network.partition.example, (tuple, list))


def prefix_of(network: Network, block: int) -> Prefix:
    """See `LocalNetwork.prefix`."""
    count = network.num_blocks
    if type(block) is not int or not 1 <= block < count:
        raise PartitionError(
            f"prefix({block!r}): the network has {count} blocks; write 1 to {count - 1}, or take network.model for all"
            if count > 1
            else f"prefix({block!r}): the network is one block, which is network.model"
        )
    head = _head_at(network, block)
    if head is None:
        raise MethodError(
            f"prefix({block}): {network.method.name} has no head behind block {block} that answers as the model does; "
            "dgl has one behind every block"
        )
    first: Any
    first, _ = separate_blocks(network.partition, network.cuts[block - 1 : block], why=f"prefix({block})")
    return _copied(Prefix(first.eval_graph, head, _several(network)))


def exits_of(network: Network, threshold: float, average: bool) -> Exits:
    """See `LocalNetwork.exits`."""
    if not threshold >= 0:
        raise MethodError(
            f"threshold={threshold}; it is the probability from which a head is sure, 0.9 say; 0 takes the first head "
            "always, more than 1 the last"
        )
    logits = network.method.require_logits("exits")
    example = positional(as_by_now(network.partition.model, network.partition.example))
    with untouched(network.model, training=False), torch.no_grad():
        own = logits(call_model(network.model, example))
    if own.dim() != 2:
        raise MethodError(
            f"exits({network.method.name}): an exit is sure of one class for each sample, by logits (B, C), and those "
            f"of a {type(network.method.task).__name__} are {tuple(own.shape)}; a prefix can be used"
        )
    heads = {b: head for b in range(1, network.num_blocks) if (head := _head_at(network, b)) is not None}
    blocks = separate_blocks(network.partition, network.cuts, why="exits")
    return _copied(Exits(blocks, heads, logits, _several(network), threshold, average))._tried(example)
