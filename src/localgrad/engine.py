"""One training step of any network by any method: executes a timetable over the model's own, suspended forward."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from localgrad.boundary import BlockGraph, Gradients, becomes, nothing_like, stopped
from localgrad.errors import TrainingError
from localgrad.forward import OpenModel, Tag, map_tensors, num_samples, tensors_in
from localgrad.isolation import check_isolation
from localgrad.method import Batch, Term, alone
from localgrad.partition.units import called_as
from localgrad.pointwise import pointwise_recomputed
from localgrad.randomness import draws_of
from localgrad.spans import Span
from localgrad.timetable import Row, timetable

if TYPE_CHECKING:
    from localgrad.network import LocalNetwork

OnOutput = Callable[[Span, Term | None, Any], None]


class Held:
    """A tensor that a block made and somebody holds: replaced in place at each boundary."""

    def __init__(self, tag: Tag, tensor: Tensor, maker: int, slot: int) -> None:
        self.tag, self.ref, self.maker, self.slot = tag, weakref.ref(tensor), maker, slot
        self.attached = self.captured = True  # to the graph it came from; so that its gradient is caught, at least


class Pass:
    """One micro-batch on its way: its suspended forward, and the graphs that some span still goes back through.

    ``blocks`` are all of them or, where others run elsewhere, the consecutive ones that run here; then ``values`` are
    what they are called with.
    """

    def __init__(
        self,
        network: LocalNetwork,
        opened: OpenModel,
        spans: Sequence[Span],
        batch: Batch,
        part: int = 0,
        share: float = 1.0,
        autocast: torch.dtype | None = None,
        blocks: range | None = None,
        values: Any = None,
    ) -> None:
        self.network, self.spans, self.batch, self.part, self.share = network, spans, batch, part, share
        self.blocks = range(network.num_blocks) if blocks is None else blocks
        self.forward = opened.call(batch.inputs if values is None else values)
        self.watch, self.autocast, self.training = opened.watch, autocast, torch.is_grad_enabled()
        self.graphs: dict[int, BlockGraph] = {}
        self.held: list[Held] = []
        self.waiting: dict[int, dict[int, Gradients]] = {span.start: {} for span in spans}
        self.outgoing: dict[int, Gradients] = {}
        self.observers = [rule.observe(network, batch) for rule in network.rules]
        self.joins = self.training and any(one.joins for one in self.observers)
        self.penalties: list[Tensor] = []
        self.parked: list[tuple[weakref.ref[Tensor], torch.device, torch.dtype]] = []

    @property
    def boundary(self) -> int:
        """How far the forward has come."""
        return self.blocks.start + self.forward.boundary

    def run(self, block: int) -> None:
        """Run the forward on to the boundary behind ``block``, unless it is further already.

        A forward that does not reach a cut this time (layer drop) joins that block to the next one.
        """
        if self.boundary > block:
            return
        self.go_on(block)
        with contextlib.ExitStack() as around:
            around.enter_context(draws_of("block", self.batch.step, self.part, block, self.network.device))
            around.enter_context(precision(self.network.device, self.autocast))
            around.enter_context(self._lean(block))
            for one in self.observers:
                around.enter_context(one.during(block))
            first = self.boundary
            self.forward.proceed()
        if not self.training:
            return
        penalties = [p for one in self.observers if (p := one.measured(block)) is not None]
        known = {id(t) for held in self.held if (t := held.ref()) is not None}
        found = list(self.forward.made(lambda tensor: id(tensor) in known).values())
        made = [*(tensor for _, tensor in found), *penalties]
        maker = self.boundary - 1
        graph = self.graphs[maker] = BlockGraph([] if self.joins else made, first)
        self.held += [Held(tag, tensor, maker, slot) for slot, (tag, tensor) in enumerate(found)]
        slots = range(len(found), len(made))
        self.penalties = [p if self.joins else graph.captured(p, s) for p, s in zip(penalties, slots, strict=True)]

    def go_on(self, block: int) -> None:
        """Let ``block`` read what finished blocks made and somebody holds, but for its graph where no span crosses.

        Just before the forward goes on, after the backward pass of the block: what a checkpointed region recomputes
        there must find its inputs as they were.
        """
        self._release(block)
        features = {id(tensor) for tensor in tensors_in(self.forward.features)}
        for held in self.held:
            if not held.captured or (tensor := held.ref()) is None:
                continue
            held.captured = any(span.start <= held.maker and span.stop > block for span in self.spans)
            if not held.captured:
                value = stopped(tensor, differentiable=self.forward.hooked)
                for one in self.observers if id(tensor) in features else ():
                    value = one.enter(value)
                becomes(tensor, value)
            elif held.attached:
                becomes(tensor, self.graphs[held.maker].captured(tensor, held.slot))
            held.attached = False
        self.held = [held for held in self.held if held.ref() is not None]

    def _release(self, block: int) -> None:
        """Let go of the data of what is held but read by no block from ``block`` on."""
        features = {id(tensor) for tensor in tensors_in(self.forward.features)}
        for held in self.held:
            last = self.watch.last.get((held.maker, held.tag), block)
            tensor = held.ref() if last < block and self._over(held.maker, last) else None
            if tensor is not None and id(tensor) not in features and tensor.device.type != "meta":
                becomes(tensor, nothing_like(tensor))
                held.captured = False

    def _over(self, maker: int, last: int) -> bool:
        """Whether every block that read a tensor has gone back, so that no recomputation will."""
        return all(block not in self.graphs for block in range(maker, last + 1))

    def _lean(self, block: int) -> contextlib.AbstractContextManager[None]:
        lean = block < self.network.method.recompute.pointwise and self.training
        return pointwise_recomputed() if lean else contextlib.nullcontext()

    def seen(self, start: int = 0) -> Any:
        """The features at the boundary, or the model's output, as a loss whose span begins at ``start`` reads them."""
        if self.joins or not self.training:
            return self.forward.features
        slots = {id(tensor): held for held in self.held if (tensor := held.ref()) is not None}

        def read(tensor: Tensor) -> Tensor:
            held = slots.get(id(tensor))
            if held is None or held.maker < start or held.maker not in self.graphs:
                return stopped(tensor)
            return self.graphs[held.maker].captured(tensor, held.slot)

        return map_tensors(read, self.forward.features)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast that the forward was under where it is suspended, else the one that was asked for."""
        enabled, dtype = self.forward.autocast
        return precision(self.network.device, dtype if enabled else self.autocast)

    def loss(self, span: Span, on_output: OnOutput | None) -> Tensor | None:
        """The weighted loss of a span, whose backward pass stops at the boundary; None if no cut was reached there."""
        if self.boundary != span.stop:
            return None
        network, boundary = self.network, span.stop
        batch = replace(self.batch, boundary=boundary)
        features = self.seen(span.start)
        observed: list[tuple[Term | None, Any]] = []
        losses: dict[int, Tensor] = {}
        with (
            draws_of("auxiliary", batch.step, self.part, str(span), network.device),
            self.precision(),
            self._lean(boundary - 1),
            called_as(self.forward.arguments),
        ):
            if boundary == network.num_blocks:
                own = (network.method.final_loss or network.method.task.loss)(features, batch)
                total = self._term_loss(boundary, None, own, features, batch)
                observed = [(None, features)]
            else:
                auxiliary = network.auxiliary_of(span)
                weighted = []
                for (term, weight), output in zip(auxiliary.terms, auxiliary(features, batch.step), strict=True):
                    if output is None:
                        continue
                    for one in self.observers:
                        output = one.answer(boundary, term, weight, output, batch)
                    loss = self._term_loss(boundary, term, term.loss(output, batch), output, batch)
                    losses[id(term)] = loss
                    weighted.append(loss if weight == 1.0 else weight * loss)
                    observed.append((term, output))
                total = weighted[0] if len(weighted) == 1 else sum(weighted[1:], weighted[0])
            for penalty in self.penalties:
                total = total + penalty
            for one in self.observers:
                total = one.total(boundary, total, losses, features, batch)
        self.penalties = []
        if on_output is not None:
            for term, output in observed:
                on_output(span, term, map_tensors(stopped, output))
        weight = span.weight * self.share
        return total if weight == 1.0 else total * weight

    def _term_loss(self, boundary: int, term: Term | None, loss: Tensor, output: Any, batch: Batch) -> Tensor:
        for one in self.observers:
            loss = one.term_loss(boundary, term, loss, output, batch)
        return loss

    def yielded(self, span: Span, on_output: OnOutput | None) -> Iterator[tuple[Span, Tensor]]:
        """The loss of a span for the caller, if there is one; then its gradient is on the way back."""
        loss = self.loss(span, on_output)
        if loss is None:
            return
        if self.training and self.spans and self.network.stage is None and tuple(self.network.spans(self.batch.step)) not in self.network.checked:
            check_isolation(self.network, span, loss, self.graphs[span.stop - 1])
        yield span, loss
        del loss
        if self.training:
            self._arrived(span)

    def _arrived(self, span: Span) -> None:
        """Take the gradient that the caller's ``loss.backward()`` left on the boundary, for the way back."""
        last = span.stop - 1
        gradients = self.graphs[last].take_gradients()
        told = [known for one in self.observers if (known := one.reached()) is not None]
        reached = any(told) if told else any(gradient is not None for gradient in gradients)
        if not reached and (gradients or told):
            raise TrainingError(
                f"the loss of span {span} was not back-propagated: call loss.backward() in the body of the loop over "
                "local_losses, or run it under torch.no_grad() to evaluate only"
            )
        self._add_waiting(span.start, last, gradients)

    def back(self, start: int, block: int, free: bool) -> None:
        """Push the gradients at the end of a block, of the spans from ``start``, back through it."""
        if (graph := self.graphs.get(block)) is not None:
            gradients = self._add_waiting(start, block, graph.take_gradients())
            del self.waiting[start][block]
            graph.backward(gradients, again=not free)
            if free:
                del self.graphs[block]
                if not self.graphs and self.boundary == self.network.num_blocks:
                    self.forward.features = None  # the output, which other micro-batches would find alive
                self._release(self.boundary)
        if block == max(start, self.blocks.start):  # the way ends: taps and features from before it get no gradient
            self.outgoing = {k: g.take_gradients() for k, g in self.graphs.items() if start <= k < self.blocks.start}
            for other in self.graphs.values():
                other.take_gradients()

    def _add_waiting(self, start: int, block: int, new: Gradients) -> Gradients:
        old = self.waiting[start].get(block)
        if old is not None:
            new = [b if a is None else a if b is None else a + b for a, b in zip(old, new, strict=True)]
        self.waiting[start][block] = new
        return new

    def park(self, wait: str) -> None:
        """Let what this part will go on with wait on the host, in ``bf16`` if asked."""
        for held in self.held:
            tensor = held.ref()
            if tensor is None or held.maker in self.graphs or self.joins or tensor.device.type == "meta":
                continue
            self.parked.append((held.ref, tensor.device, tensor.dtype))
            low = wait == "bf16" and tensor.is_floating_point()
            becomes(tensor, stopped(tensor).to("cpu", torch.bfloat16 if low else tensor.dtype))

    def unpark(self) -> None:
        """Bring it back."""
        for ref, device, dtype in self.parked:
            if (tensor := ref()) is not None:
                becomes(tensor, tensor.to(device, dtype))
        self.parked = []


def precision(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``dtype``; nothing if it is None."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def parts_of(inputs: Any, targets: Any, parts: int) -> list[tuple[Any, Any, float]]:
    """Micro-batches, each with its share of the batch; fewer than ``parts`` if there are fewer samples."""
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs  # of a model with several, not one for each sample
    size, wanted = num_samples(inputs), num_samples(targets)
    if wanted is not None and wanted != size:
        raise TrainingError(
            f"{size} samples in inputs and {wanted} in targets; give one target for each sample, or None as targets if "
            "the task's loss reads none"
        )
    edges = [size * k // parts for k in range(parts + 1)] if size is not None else [0]
    if parts == 1 or size is None:
        return [(inputs, targets, 1.0)]
    return [(rows(inputs, a, b), rows(targets, a, b), (b - a) / size) for a, b in pairwise(edges) if b > a]


def rows(values: Any, start: int, stop: int) -> Any:
    """Samples ``start`` to ``stop`` of such a batch, in the same form; what has no samples stays as it is."""
    if isinstance(values, list) or (isinstance(values, Tensor) and values.dim()):
        return values[start:stop]
    if isinstance(values, Mapping):
        return {name: rows(value, start, stop) for name, value in values.items()}
    return tuple(rows(value, start, stop) for value in values) if isinstance(values, tuple) else values


def local_losses(
    network: LocalNetwork,
    inputs: Any,
    targets: Any,
    step: int = 0,
    *,
    autocast: torch.dtype | None = None,
    on_output: OnOutput | None = None,
    on_block_done: Callable[[int], None] | None = None,
) -> Iterator[tuple[Span, Tensor]]:
    """Run one step and yield each local loss as soon as its features exist; call ``loss.backward()`` on each.

    ``loss = span.weight * sum_i weight_i * term_i.loss(head_i(features), batch)``, and the task's loss of the model's
    own output where the span ends the network. The model's own forward runs once, suspended at the cuts. When the
    generator goes on, it carries the gradient on through the rest of the span and frees those activations before the
    next block runs, so all gradients are complete when the loop ends. `localgrad.timetable` draws the order.

    Args:
        network: from `localize`.
        inputs: a batch: a tensor, (B, C, H, W) for images; a tuple for a model with several inputs; a mapping of
            keyword arguments.
        targets: what the task expects, (B,) class indices or (B, num_classes) probabilities for classification; a nest
            of tensors with B rows, lists with B entries, tuples and mappings of these.
        step: optimizer steps done so far; schedules and, under `keyed_randomness`, random draws depend on it.
        autocast: run blocks, heads and losses under autocast to this dtype; backward passes stay outside. Heads follow
            the autocast that the model's forward enters by itself, or a trainer for it.
        on_output: called with (span, term, detached output) of each head, term None for the model's own.
        on_block_done: called with the index of a block once its gradients, and those of heads on its output, are
            complete.

    Yields:
        (span, loss): a scalar; logged values should be detached. A forward that skips the module a block begins with
        (layer drop) joins that block to the one before, and the losses between them rest.

    Raises:
        TrainingError: if a loss was not back-propagated although gradients are enabled; if targets are not one for each
            sample; if heads are in another mode than the model.
        PartitionError: if the first step shows that a loss would train a parameter outside its span.

    Example:
        >>> import torch, localgrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> network = localgrad.localize(model, method, 2, example=x)
        >>> for span, loss in localgrad.local_losses(network, x, y, step=0):
        ...     loss.backward()

    Source: the window with one forward is our own; gradients equal those of a forward per window (HPFF,
    arXiv:2407.05638).
    """
    require_network(network, "local_losses")
    network.check_ready()
    training = torch.is_grad_enabled()
    spans = network.spans(step)
    replicas = network.replicas if training else None
    announce = on_block_done or (lambda block: None)
    with contextlib.nullcontext(announce) if replicas is None else replicas.reducing(step, announce) as done:
        if network.stage is not None:
            yield from network.stage.local_losses(inputs, targets, step, autocast, on_output, done)
            return
        parts = parts_of(inputs, targets, network.method.accumulate.parts)
        if replicas is not None:
            replicas.count(step, num_samples(inputs) or 1)
        joined = alone if replicas is None else replicas.joined
        with network.opened(spans) as opened:
            passes = []
            for part, (x, y, share) in enumerate(parts):
                batch = in_context(network, Batch(x, y, step, joined=joined), part, autocast)
                passes.append(Pass(network, opened, spans, batch, part, share, autocast))
            late = any(rule.late for rule in network.rules)
            table = timetable(spans, network.num_blocks, len(parts), late=late, training=training)
            yield from execute(network, table, passes, on_output, done)
    network.checked |= {spans} if training else set()


def require_network(network: Any, caller: str) -> None:
    """Raise `TrainingError` if a wrapper was put around a network, which would be passed by."""
    from localgrad.network import LocalNetwork

    if not isinstance(network, LocalNetwork):
        raise TrainingError(
            f"{caller} got a {type(network).__name__}; it takes what localize returns. Around a network neither "
            "DistributedDataParallel nor torch.compile has an effect: write localgrad.distributed.data_parallel(network, "
            "mesh), or network.compile_blocks()"
        )


def in_context(network: LocalNetwork, batch: Batch, part: int, autocast: torch.dtype | None) -> Batch:
    """The batch with what the method computes for it before the first block runs."""
    if not network.method.contexts:
        return batch
    device = network.device
    with torch.no_grad(), draws_of("context", batch.step, part, "", device), precision(device, autocast):
        return replace(batch, context={context: context(network, batch) for context in network.method.contexts})


def execute(
    network: LocalNetwork,
    table: Iterable[Row],
    passes: Sequence[Pass],
    on_output: OnOutput | None,
    done: Callable[[int], None],
) -> Iterator[tuple[Span, Tensor]]:
    """Do what the rows say; yields (span, loss) at each row ``loss``."""
    wait = network.method.accumulate.wait
    current: Pass | None = None
    for row in table:
        one = passes[row.part]
        if one is not current:
            if current is not None and wait != "device":
                current.park(wait)
            one.unpark()
            current = one
        if row.do == "forward":
            one.run(row.block)
        elif row.do == "loss":
            assert row.span is not None
            yield from one.yielded(row.span, on_output)
        elif row.do == "back":
            one.back(row.start, row.block, row.free)
        elif row.do == "twins":
            network.exchange_before_step(row.block + 1)
        else:
            done(row.block)


def backward(
    network: LocalNetwork, inputs: Any, targets: Any, step: int = 0, *, autocast: torch.dtype | None = None
) -> dict[Span, Tensor]:
    """One call for the whole loop over `local_losses`: every gradient is accumulated in ``.grad``.

    Returns:
        The detached loss of each span, summed over micro-batches.

    Example:
        >>> import torch, localgrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> task = localgrad.tasks.classification(3)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> network = localgrad.localize(model, localgrad.methods.dgl(task), 2, example=x)
        >>> losses = localgrad.backward(network, x, y)
    """
    losses: dict[Span, Tensor] = {}
    for span, loss in local_losses(network, inputs, targets, step, autocast=autocast):
        loss.backward()
        losses[span] = losses[span] + stopped(loss) if span in losses else stopped(loss)
    return losses


@torch.no_grad()
def local_outputs(
    network: LocalNetwork, inputs: Any, *, autocast: torch.dtype | None = None, scored_only: bool = False
) -> Iterator[tuple[Span, Term | None, Any]]:
    """Run the model once and yield the output of every head: (span, term, output), term None for the model's own.

    Mode is the caller's business: call ``network.eval()`` first to evaluate. ``scored_only`` leaves out heads whose
    output the task cannot score, such as decoders. Leaving the loop early leaves the rest of the model out.
    """
    require_network(network, "local_outputs")
    network.check_ready()
    if network.stage is not None:
        yield from network.stage.local_outputs(inputs, autocast, scored_only)
        return
    with network.opened(()) as opened:
        one = Pass(network, opened, (), Batch(inputs, None, 0), autocast=autocast)
        for block in one.blocks:
            one.run(block)
            yield from answers_at(one, block, scored_only)


@torch.no_grad()
def features(network: LocalNetwork, inputs: Any) -> Iterator[Any]:
    """The features behind each block, then the model's output; mode is the caller's business."""
    with network.opened(()) as opened:
        one = Pass(network, opened, (), Batch(inputs, None, 0))
        for block in one.blocks:
            one.run(block)
            yield one.forward.features


def answers_at(one: Pass, block: int, scored_only: bool) -> Iterator[tuple[Span, Term | None, Any]]:
    """What every head behind ``block`` answers, the model's own included; see `local_outputs`."""
    network = one.network
    if one.boundary != block + 1:
        return
    for span, auxiliary in network.auxiliaries_at(block + 1):
        wanted = [
            (t, h) for (t, _), h in zip(auxiliary.terms, auxiliary.heads, strict=True) if t.scored or not scored_only
        ]
        with one.precision(), called_as(one.forward.arguments):
            bridged = auxiliary.bridged(one.forward.features) if wanted else one.forward.features
            outputs = [(term, head(bridged)) for term, head in wanted]
        for term, output in outputs:
            yield span, term, output
    if block == network.num_blocks - 1:
        own = next(span for span in network.spans(0) if span.stop == network.num_blocks)
        yield own, None, one.forward.features
