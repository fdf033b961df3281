"""One micro-batch on its way through the blocks: its suspended forward, and the graphs that wait for a way back."""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.batches import map_tensors, only_read, tensors_in
from localgrad.boundary import BlockGraph, Gradients, Released, becomes, stopped
from localgrad.errors import PartitionError, TrainingError
from localgrad.isolation import check_isolation
from localgrad.method import Term
from localgrad.network import LocalNetwork
from localgrad.opened import OpenModel
from localgrad.partition.units import called_as
from localgrad.randomness import draws_of
from localgrad.recompute.pointwise import pointwise_recomputed
from localgrad.spans import Span
from localgrad.suspension.frames import Tag
from localgrad.task import Batch

OnOutput = Callable[[Span, Term | None, Any], None]


class Held:
    """A tensor that a block made and somebody holds: replaced in place at each boundary."""

    def __init__(self, tag: Tag, tensor: Tensor, maker: int, slot: int) -> None:
        self.tag, self.ref, self.maker, self.slot = tag, weakref.ref(tensor), maker, slot
        self.attached = self.captured = True  # to the graph it came from; so that its gradient is caught, at least
        self.released = False
        self.kept: bool | None = None  # by somebody beside frames; None until its last reader has run


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
        self.device = network.device
        self.watch, self.autocast, self.training = opened.watch, autocast, torch.is_grad_enabled()
        known = (tuple(spans), network.trains) in network.checked
        self.checks = self.training and len(spans) > 0 and network.stage is None and not known
        self.graphs: dict[int, BlockGraph] = {}
        self.held: list[Held] = []
        self.waiting: dict[int, dict[int, Gradients]] = {span.start: {} for span in spans}
        self.outgoing: dict[int, Gradients] = {}
        self.observers = [rule.observe(network, batch) for rule in network.rules]
        self.joins = self.training and any(one.joins for one in self.observers)
        self.penalties: list[Tensor] = []
        self.counts: dict[tuple[int, Tag, int], list[int]] | None = None  # references to what is held, if asked for
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
        self.network.begins(block)
        self.go_on(block)
        with contextlib.ExitStack() as around:
            around.enter_context(draws_of("block", self.batch.step, self.part, block, self.device))
            around.enter_context(precision(self.device, self.autocast))
            around.enter_context(self._lean(block))
            for one in self.observers:
                around.enter_context(one.during(block))
            first = self.boundary
            try:
                self.forward.proceed()
            except (RuntimeError, SystemError) as error:
                if any(held.released for held in self.held) and _is_internal(error):
                    raise TrainingError(
                        f"block {block} read a tensor that no block reads so late in a forward over the example of "
                        "localize, so its data was let go of. Call localize with an example that takes the same "
                        "branches, or cut behind it"
                    ) from error
                raise
        if not self.training:
            return
        penalties = [p for one in self.observers if (p := one.measured(block)) is not None]
        known = {id(t) for held in self.held if (t := held.ref()) is not None}
        found = list(self.forward.made(lambda tensor: id(tensor) in known).values())
        made = [*(tensor for _, tensor in found), *(p for p in penalties if p.requires_grad)]
        maker = self.boundary - 1
        graph = self.graphs[maker] = BlockGraph([] if self.joins else made, first)
        joined: Tag = ("joined",)  # it is not known what of it later blocks read
        tags = [tag if maker == block else joined for tag, _ in found]
        self.held += [Held(tags[slot], tensor, maker, slot) for slot, (_, tensor) in enumerate(found)]
        slots = itertools.count(len(found))
        self.penalties = [p if self.joins or not p.requires_grad else graph.captured(p, next(slots)) for p in penalties]

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
                value = stopped(tensor, differentiable=self.forward.hooked or self.network.reentrant)
                for one in self.observers if id(tensor) in features else ():
                    value = one.enter(value)
                becomes(tensor, value)
            elif held.attached:
                becomes(tensor, self.graphs[held.maker].passed_on(tensor, held.slot))
            held.attached = False
        self.held = [held for held in self.held if held.ref() is not None]

    def _release(self, block: int) -> None:
        """Let go of the data of what only frames hold and no block from ``block`` on reads."""
        features = {id(tensor) for tensor in tensors_in(self.forward.features)}
        for held in self.held:
            if held.released or (tensor := held.ref()) is None or id(tensor) in features:
                continue
            references = sys.getrefcount(tensor)
            if self.counts is not None:
                self.counts.setdefault((held.maker, held.tag, block), []).append(references)
            last, known = self.watch.last.get((held.maker, held.tag), (block, 0))
            if last < block and held.kept is None:  # counted where the rehearsal did: later, frames hold less
                held.kept = references > known
            if held.kept is False and self._over(held.maker, last):
                becomes(tensor, Released(tensor))
                held.captured, held.released = False, True

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
            if held is None and isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                raise PartitionError(
                    f"the model returns a parameter of shape {tuple(tensor.shape)} as it is, and no block would train "
                    "it by what a loss makes of it; return parameter.view_as(parameter)"
                )
            if held is None or held.maker < start or held.maker not in self.graphs:
                return stopped(tensor)
            return self.graphs[held.maker].captured(tensor, held.slot)

        return map_tensors(read, self.forward.features)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast that the forward was under where it is suspended, else the one that was asked for."""
        enabled, dtype = self.forward.autocast
        return precision(self.device, dtype if enabled else self.autocast)

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
            draws_of("auxiliary", batch.step, self.part, str(span), self.device),
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
                with only_read(features, boundary - 1):
                    outputs = auxiliary(features, batch.step)
                for (term, weight), output in zip(auxiliary.terms, outputs, strict=True):
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
        if self.training and not total.requires_grad:
            total = self._constant(span, total)
        if on_output is not None:
            for whose, output in observed:
                on_output(span, whose, map_tensors(stopped, output))
        weight = span.weight * self.share
        return total if weight == 1.0 else total * weight

    def _constant(self, span: Span, total: Tensor) -> Tensor:
        """The loss of a span of which nothing trains, frozen blocks say, as one whose backward pass does nothing."""
        block = span.stop - 1
        if self.graphs[block].gradients:
            raise TrainingError(
                f"the loss of span {span} depends on no parameter, although block {block} has some that train: it is "
                "computed under torch.no_grad() or from detached values"
            )
        return stopped(total, differentiable=True)

    def _term_loss(self, boundary: int, term: Term | None, loss: Tensor, output: Any, batch: Batch) -> Tensor:
        for one in self.observers:
            loss = one.term_loss(boundary, term, loss, output, batch)
        return loss

    def yielded(self, span: Span, on_output: OnOutput | None) -> Iterator[tuple[Span, Tensor]]:
        """The loss of a span for the caller, if there is one; then its gradient is on the way back."""
        loss = self.loss(span, on_output)
        if loss is None:
            return
        if self.checks:
            check_isolation(self.network, span, loss, self.graphs[span.stop - 1])
        try:
            yield span, loss
        except GeneratorExit:
            if self.training and self._arrived(span)[1]:
                warnings.warn(
                    f"the loop over local_losses was left before the gradient of the loss of span {span} was carried "
                    "into its block, where it is missing now. Let the loop end; in zip() put local_losses first",
                    stacklevel=2,
                )
            raise
        del loss
        if self.training:
            gradients, reached = self._arrived(span)
            if reached is False:
                raise TrainingError(
                    f"the loss of span {span} was not back-propagated: call loss.backward() in the body of the loop "
                    "over local_losses, or run it under torch.no_grad() to evaluate only"
                )
            self._add_waiting(span.start, span.stop - 1, gradients)

    def _arrived(self, span: Span) -> tuple[Gradients, bool | None]:
        """The gradient that the caller's ``loss.backward()`` left on the boundary, and whether it did, if told."""
        gradients = self.graphs[span.stop - 1].take_gradients()
        told = [known for one in self.observers if (known := one.reached()) is not None]
        reached = any(told) if told else any(gradient is not None for gradient in gradients)
        return gradients, reached if gradients or told else None

    def covers(self, block: int) -> bool:
        """Whether a graph that still waits for a way back goes through a block."""
        return any(graph.first <= block <= maker for maker, graph in self.graphs.items())

    def back(self, start: int, block: int, free: bool) -> None:
        """Push the gradients at the end of a block, of the spans from ``start``, back through it."""
        if (graph := self.graphs.get(block)) is not None:
            gradients = self._add_waiting(start, block, graph.take_gradients())
            del self.waiting[start][block]
            earlier = [other for maker, other in self.graphs.items() if start <= maker < block]
            graph.backward(gradients, earlier, again=not free)
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
            if tensor is None or held.maker in self.graphs or self.joins or held.released:
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


def _is_internal(error: Exception) -> bool:
    """Whether an error is what torch says to the operand of an operation that is no real tensor."""
    return isinstance(error, SystemError) or "python_arg_parser" in str(error) or "was let go of" in str(error)


def precision(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``dtype``; nothing if it is None."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def answers_at(one: Pass, block: int, scored_only: bool) -> Iterator[tuple[Span, Term | None, Any]]:
    """What every head behind ``block`` answers, the model's own included; see `local_outputs`."""
    network = one.network
    if one.boundary != block + 1:
        return
    for span, auxiliary in network.auxiliaries_at(block + 1):
        wanted = [
            (t, h) for (t, _), h in zip(auxiliary.terms, auxiliary.heads, strict=True) if t.scored or not scored_only
        ]
        with one.precision(), called_as(one.forward.arguments), only_read(one.forward.features, block):
            bridged = auxiliary.bridged(one.forward.features) if wanted else one.forward.features
            outputs = [(term, head(bridged)) for term, head in wanted]
        for term, output in outputs:
            yield span, term, output
    if block == network.num_blocks - 1:
        own = next(span for span in network.spans(0) if span.stop == network.num_blocks)
        yield own, None, one.forward.features
