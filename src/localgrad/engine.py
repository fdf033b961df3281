"""One training step of any network by any method: forward, loss, the caller's backward, detach."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from localgrad.errors import PartitionError, TrainingError
from localgrad.method import Batch, Followed, Term, alone
from localgrad.partition import INPUTS
from localgrad.pointwise import pointwise_recomputed
from localgrad.randomness import draws_of
from localgrad.recompute import recomputed
from localgrad.spans import Span

if TYPE_CHECKING:
    from localgrad.network import LocalNetwork

OnOutput = Callable[[Span, Term | None, Any], None]


class _Inject(torch.autograd.Function):
    """A scalar whose backward pass sends the gradients in ``box`` into ``outputs``.

    Handing them to ``torch.autograd.backward`` would keep them, and the outputs, alive for as long as it runs.
    """

    @staticmethod
    def forward(ctx: Any, box: list[Tensor | None], *outputs: Tensor) -> Tensor:
        ctx.box = box
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None, *ctx.box)
        ctx.box.clear()
        return gradients


class _Capture(torch.autograd.Function):
    """The same features; their gradient is added to ``gradients[index]`` as it is, and goes no further.

    A leaf's ``.grad`` would do but for its strides: autograd may copy a gradient to lay it out like the leaf, after
    which the blocks before it sum in another order than end-to-end training does.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, leaf: Tensor, gradients: list[Tensor | None], index: int) -> Tensor:
        ctx.gradients, ctx.index = gradients, index
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:  # type: ignore[override]
        known = ctx.gradients[ctx.index]
        ctx.gradients[ctx.index] = gradient if known is None else known + gradient
        return None, None, None, None


class Run:
    """What the backward pass of a block needs: the way into its graph, and the gradients of its outputs.

    ``values`` are the outputs, detached; ``slots`` say which of them carry a gradient, by identity. With ``join`` the
    loss stays in one graph with the block, so that it can be differentiated twice.
    """

    def __init__(self, outputs: Any, join: bool = False) -> None:
        self._box: list[Tensor | None] = []
        graphs: list[Tensor] = []
        self.slots: dict[int, int] = {}
        self.joined: dict[int, Tensor] | None = {} if join else None
        self.values = tree_map_only(Tensor, lambda value: self._cut(value, graphs), outputs)
        self.gradients: list[Tensor | None] = [None] * len(graphs)
        self._root = _Inject.apply(self._box, *graphs) if graphs else None

    def _cut(self, value: Tensor, graphs: list[Tensor]) -> Tensor:
        """The one place where features are detached."""
        detached = value.detach()
        if value.requires_grad and self.joined is not None:
            self.joined[id(detached)] = value
        elif value.requires_grad:
            self.slots[id(detached)] = len(graphs)
            graphs.append(value)
        return detached

    def captured(self, values: Any) -> Any:
        """The detached outputs again, such that a backward pass from them leaves its gradients here."""

        def capture(value: Tensor) -> Tensor:
            if self.joined is not None:
                return self.joined.pop(id(value), value)
            slot = self.slots.get(id(value))
            if slot is None:
                return value
            return _Capture.apply(torch.zeros((), requires_grad=True), value, self.gradients, slot)

        return tree_map_only(Tensor, capture, values)

    def take_gradients(self) -> list[Tensor | None]:
        """The gradients left here, which are forgotten."""
        gradients = list(self.gradients)
        self.gradients[:] = [None] * len(gradients)
        return gradients

    def backward(self, gradients: list[Tensor | None], again: bool) -> None:
        """Send gradients of the outputs through the block; keep its graph only if it is needed ``again``."""
        self._box[:] = gradients
        gradients.clear()
        root = self._root
        if not again:
            self._root = None
        if root is not None:  # nothing to train at or before a frozen first block
            torch.autograd.backward(root, retain_graph=again)


class _Seam:
    """Where two blocks meet whose gradients are to agree: that of the later one's loss, and what the earlier one had.

    Gives the later block an input with gradient, and takes that gradient before the caller's backward pass does.
    """

    def __init__(self, penalty: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.penalty = penalty
        self.entry: Tensor | None = None
        self.before: Tensor | None = None
        self.passed = False

    def entered(self, features: Tensor) -> Tensor:
        """The features again, as what the block's loss is differentiated by."""
        # No leaf: hooks that count FLOPs by module do not stand torch.autograd.grad with respect to one.
        self.entry = features.detach().requires_grad_().view_as(features)
        return self.entry

    def closed(self, loss: Tensor, features: Tensor) -> Tensor:
        """The loss with its penalty; remembers its gradient by ``features``, the block's output, for the next block."""
        if self.entry is None or self.before is None:
            (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
        else:
            gradient, ours = torch.autograd.grad(loss, (features, self.entry), create_graph=True)
            loss = loss + self.penalty(ours, self.before)
        self.entry, self.before, self.passed = None, gradient.detach(), False
        features.register_hook(self._note)
        return loss

    def _note(self, _: Tensor) -> None:
        self.passed = True


class Pass:
    """One forward of ``blocks`` over one micro-batch, with the runs that some span still has to go back through.

    ``blocks`` are all of them or, where others run elsewhere, the consecutive ones that run here.
    """

    def __init__(
        self, network: LocalNetwork, spans: Sequence[Span], batch: Batch, part: int, share: float, blocks: range
    ) -> None:
        self.network, self.batch, self.part, self.share, self.blocks = network, batch, part, share, blocks
        self.spans = sorted(spans, key=lambda span: (span.stop, -span.start))
        self.values: dict[str, Any] = {INPUTS: batch.inputs}
        self.maker: dict[str, int] = {INPUTS: -1}
        self.runs: dict[int, Run] = {}
        # Spans that start together share one way back, taken when the widest of them ends; until then the gradients of
        # the narrower ones wait at their boundary.
        self.ends = {s.start: max(t.stop for t in spans if t.start == s.start) for s in spans}
        self.waiting: dict[int, dict[int, list[Tensor | None]]] = {start: {} for start in self.ends}
        self.passes_left = [sum(s <= k < e for s, e in self.ends.items()) for k in range(len(network.blocks))]
        self.outgoing: dict[int, list[Tensor | None]] = {}
        self.penalties: dict[int, Tensor] = {}
        self.previous: Any = None
        self.answers: tuple[int, Any] | None = None
        self.following: list[tuple[int, Term, float, Tensor]] = []
        self.seam: _Seam | None = None
        if network.method.reconcile is not None and all(s.stop - s.start == 1 for s in spans):
            self.seam = _Seam(network.method.reconcile)

    def forward(self, index: int, autocast: torch.dtype | None) -> None:
        """Run a block; its outputs replace the values nobody reads any more."""
        block = self.network.blocks[index]
        arguments = [self._argument(name, index) for name in block.inputs]
        crossing = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
        versions = [t._version for t in crossing]
        outputs = self._call(index, arguments, autocast)
        if any(t._version != version for t, version in zip(crossing, versions, strict=True)):
            raise PartitionError(
                f"block {index} overwrites its input in place, but a span that starts before it still needs those "
                "features; begin the block after that layer, or build the layer with inplace=False"
            )
        run = self.runs[index] = Run(outputs, join=self.seam is not None and torch.is_grad_enabled())
        values = list(run.values)
        if len(values) > len(block.outputs):
            self.penalties[index] = values.pop()
        for name, value in zip(block.outputs, values, strict=True):
            self.values[name], self.maker[name] = value, index
        del run.values
        for name in [n for n in self.values if self.network.last_reader(n) <= index and n not in block.outputs]:
            del self.values[name]

    def _argument(self, name: str, index: int) -> Any:
        """A value for block ``index``; its gradient is wanted only if a span covers its maker and the block."""
        value, maker = self.values[name], self.maker[name]
        if torch.is_grad_enabled() and any(s.start <= maker and s.stop > index for s in self.spans):
            return self.runs[maker].captured(value)
        if self.seam is not None and index > 0 and name == self.network.blocks[index - 1].outputs[0]:
            return self.seam.entered(value)
        return value

    def _call(self, index: int, arguments: list[Any], autocast: torch.dtype | None) -> Any:
        waits = any(span.covers(index) and span.stop > index + 1 for span in self.spans)
        device = self.network.device
        run = self.network.probed(index)
        with (
            draws_of("block", self.batch.step, self.part, index, device),
            precision(device, autocast),
            self._lean(index),
        ):
            if self.network.method.checkpoint and waits and torch.is_grad_enabled():
                return recomputed(run, *arguments)
            return run(*arguments)

    def _lean(self, index: int) -> contextlib.AbstractContextManager[None]:
        if index < self.network.method.checkpoint_pointwise and torch.is_grad_enabled():
            return pointwise_recomputed()
        return contextlib.nullcontext()

    def loss(self, span: Span, autocast: torch.dtype | None, on_output: OnOutput | None) -> Tensor:
        """The weighted loss of a span; its backward pass stops at the boundary."""
        network, device = self.network, self.network.device
        features = self.values[network.blocks[span.stop - 1].outputs[0]]
        if torch.is_grad_enabled():
            features = self.runs[span.stop - 1].captured(features)
        if self.answers is not None and self.answers[0] < span.stop:
            self.previous, self.answers = self.answers[1], None
        batch = replace(self.batch, boundary=span.stop, previous=self.previous)
        with (
            draws_of("auxiliary", batch.step, self.part, str(span), device),
            precision(device, autocast),
            self._lean(span.stop - 1),
        ):
            if span.stop == len(network.blocks):
                total = (network.method.final_loss or network.method.task.loss)(features, batch)
                observed: list[tuple[Term | None, Any]] = [(None, features)]
                own: dict[int, Tensor] = {}
            else:
                total, observed, own = self._auxiliary_loss(span, features, batch)
            for late in self._caught_up(span.stop, own, total):
                total = total + late
            if span.stop - 1 in self.penalties:
                total = total + self.runs[span.stop - 1].captured(self.penalties.pop(span.stop - 1))
            if self.seam is not None and torch.is_grad_enabled():
                total = self.seam.closed(total, next(t for t in tree_leaves(features) if isinstance(t, Tensor)))
        for term, output in observed:
            detached = tree_map_only(Tensor, Tensor.detach, output)
            if on_output is not None:
                on_output(span, term, detached)
            if self.answers is None and term is not None and term.scored:
                self.answers = (span.stop, detached)
        weight = span.weight * self.share
        return total if weight == 1.0 else total * weight

    def _auxiliary_loss(
        self, span: Span, features: Tensor, batch: Batch
    ) -> tuple[Tensor, list[tuple[Term | None, Any]], dict[int, Tensor]]:
        """The sum of the terms of a boundary, what each head answered, and the loss of each term by its identity."""
        auxiliary = self.network.auxiliary_of(span)
        observed: list[tuple[Term | None, Any]] = []
        own: dict[int, Tensor] = {}
        weighted = []
        for (term, weight), output in zip(auxiliary.terms, auxiliary(features, batch.step), strict=True):
            if output is None:
                continue
            if isinstance(output, Followed):
                self.following.append((span.stop, term, weight, term.loss(output.own, batch)))
                output = output.output
            loss = own[id(term)] = term.loss(output, batch)
            weighted.append(loss if weight == 1.0 else weight * loss)
            observed.append((term, output))
        return weighted[0] if len(weighted) == 1 else sum(weighted[1:], weighted[0]), observed, own

    def _caught_up(self, stop: int, own: dict[int, Tensor], total: Tensor) -> Iterator[Tensor]:
        """The losses of heads at earlier boundaries that were to have that of their term here, or the model's own."""
        due = [entry for entry in self.following if entry[0] < stop]
        self.following = [entry for entry in self.following if entry[0] >= stop]
        for _, term, weight, loss in due:
            apart = loss - own.get(id(term), total).detach()
            if self.batch.joined is not alone:  # the distance of two means over all samples, not a mean of distances
                apart = self.batch.joined(apart.expand(len(tree_leaves(self.batch.inputs)[0]))).mean()
            yield weight * apart.abs()

    def back(self, span: Span) -> list[int]:
        """Push the gradient that the caller's ``loss.backward()`` left on the boundary back through the span.

        Returns the blocks that no later span of this pass trains.
        """
        last = span.stop - 1
        gradients = self.runs[last].take_gradients()
        reached = self.seam.passed if self.seam is not None else any(g is not None for g in gradients)
        if not reached and (gradients or self.seam is not None):
            raise TrainingError(
                f"the loss of span {span} was not back-propagated: call loss.backward() in the body of the loop over "
                "local_losses, or run it under torch.no_grad() to evaluate only"
            )
        self._add_waiting(span.start, last, gradients)
        del gradients  # the way back frees them as it goes
        return [] if span.stop < self.ends[span.start] else self.way_back(span.start, last)

    def way_back(self, start: int, last: int) -> list[int]:
        """Push the gradients at the ends of the spans from ``start`` back through the blocks up to ``last``.

        Returns the blocks that no later span of this pass trains. Gradients of what came from blocks that run
        elsewhere are left in ``outgoing``.
        """
        finished = []
        for index in range(last, max(start, self.blocks.start) - 1, -1):
            gradients = self._add_waiting(start, index, self.runs[index].take_gradients())
            del self.waiting[start][index]
            self.passes_left[index] -= 1
            again = self.passes_left[index] > 0
            if not again:
                finished.append(index)
            self.runs[index].backward(gradients, again)
        self.outgoing = {k: run.take_gradients() for k, run in self.runs.items() if start <= k < self.blocks.start}
        for run in self.runs.values():  # taps and features from before the span: the gradient ends here
            run.take_gradients()
        return finished

    def _add_waiting(self, start: int, index: int, new: list[Tensor | None]) -> list[Tensor | None]:
        old = self.waiting[start].get(index)
        if old is not None:
            new = [b if a is None else a if b is None else a + b for a, b in zip(old, new, strict=True)]
        self.waiting[start][index] = new
        return new


def precision(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``dtype``; nothing if it is None."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def parts_of(inputs: Any, targets: Any, parts: int) -> list[tuple[Any, Any, float]]:
    """Micro-batches, each with its share of the batch; fewer than ``parts`` if there are fewer samples."""
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs  # of a model with several, not one for each sample
    size = num_samples(inputs)
    edges = [size * k // parts for k in range(parts + 1)]
    return [(rows(inputs, a, b), rows(targets, a, b), (b - a) / size) for a, b in pairwise(edges) if b > a]


def num_samples(values: Any) -> int:
    """Samples of a batch, given as a tensor of B rows, a list of B entries, or tuples and mappings of these."""
    while isinstance(values, (tuple, Mapping)):
        values = next(iter(values.values() if isinstance(values, Mapping) else values))
    return len(values)


def rows(values: Any, start: int, stop: int) -> Any:
    """Samples ``start`` to ``stop`` of such a batch, in the same form."""
    if isinstance(values, (Tensor, list)):
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
    own output where the span ends the network. Every block runs forward once. When the generator goes on, it carries
    the gradient on through the rest of the span and frees those activations before the next block runs, so all
    gradients are complete when the loop ends.

    Args:
        network: from `localize`.
        inputs: a batch, (B, C, H, W) for images, or a tuple of tensors for models with several inputs.
        targets: what the task expects, (B,) class indices or (B, num_classes) probabilities for classification; a nest
            of tensors with B rows, lists with B entries, tuples and mappings of these.
        step: optimizer steps done so far; schedules and, under `keyed_randomness`, random draws depend on it.
        autocast: run blocks, heads and losses under autocast to this dtype; backward passes stay outside.
        on_output: called with (span, term, detached output) of each head, term None for the model's own.
        on_block_done: called with the index of a block once its gradients, and those of heads on its output, are
            complete.

    Yields:
        (span, loss): a scalar; logged values should be detached.

    Raises:
        TrainingError: if a loss was not back-propagated although gradients are enabled.
        PartitionError: if a block overwrites features in place that a wider span still needs.

    Example:
        >>> import torch, localgrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> network = localgrad.localize(model, method, num_blocks=2, example=x)
        >>> for span, loss in localgrad.local_losses(network, x, y, step=0):
        ...     loss.backward()

    Source: the window with one forward is our own; gradients equal those of a forward per window (HPFF,
    arXiv:2407.05638).
    """
    spans = network.spans(step)
    replicas = network.replicas if torch.is_grad_enabled() else None
    announce = on_block_done or (lambda block: None)
    with contextlib.nullcontext(announce) if replicas is None else replicas.reducing(step, announce) as done:
        if network.stage is not None:
            yield from network.stage.local_losses(inputs, targets, step, autocast, on_output, done)
            return
        if replicas is not None:
            replicas.count(step, len(tree_leaves(inputs)[0]))
        parts = parts_of(inputs, targets, network.method.micro_batches)
        for part, (x, y, share) in enumerate(parts):
            batch = Batch(x, y, step, joined=alone if replicas is None else replicas.joined)
            last = part == len(parts) - 1
            yield from _one_pass(network, spans, batch, part, share, autocast, on_output, last, done)


def _one_pass(
    network: LocalNetwork,
    spans: Sequence[Span],
    batch: Batch,
    part: int,
    share: float,
    autocast: torch.dtype | None,
    on_output: OnOutput | None,
    last_part: bool,
    on_block_done: Callable[[int], None],
) -> Iterator[tuple[Span, Tensor]]:
    with (
        torch.no_grad(),
        draws_of("context", batch.step, part, "", network.device),
        precision(network.device, autocast),
    ):
        batch = replace(batch, context={context: context(network, batch) for context in network.method.contexts})
    state = Pass(network, spans, batch, part, share, range(len(network.blocks)))
    held: list[int] = []
    for index in range(len(network.blocks)):
        state.forward(index, autocast)
        for span in (s for s in state.spans if s.stop == index + 1):
            yield span, state.loss(span, autocast, on_output)
            if torch.is_grad_enabled():
                held += state.back(span)
        if last_part:
            if torch.is_grad_enabled():
                network.exchange_before_step(index + 1)
            done = [k for k in held if not any(stop == k + 1 for stop, *_ in state.following)]
            held = [k for k in held if k not in done]
            for block in done:
                on_block_done(block)
        state.runs = {k: run for k, run in state.runs.items() if state.passes_left[k] > 0}


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
        >>> network = localgrad.localize(model, localgrad.methods.dgl(task), num_blocks=2, example=x)
        >>> losses = localgrad.backward(network, x, y)
    """
    losses: dict[Span, Tensor] = {}
    for span, loss in local_losses(network, inputs, targets, step, autocast=autocast):
        loss.backward()
        losses[span] = losses[span] + loss.detach() if span in losses else loss.detach()
    return losses


@torch.no_grad()
def local_outputs(
    network: LocalNetwork, inputs: Any, *, autocast: torch.dtype | None = None, scored_only: bool = False
) -> Iterator[tuple[Span, Term | None, Any]]:
    """Run the blocks once and yield the output of every head: (span, term, output), term None for the model's own.

    Mode is the caller's business: call ``network.eval()`` first to evaluate. ``scored_only`` leaves out heads whose
    output the task cannot score, such as decoders.
    """
    if network.stage is not None:
        yield from network.stage.local_outputs(inputs, autocast, scored_only)
        return
    state = Pass(network, (), Batch(inputs, None, 0), 0, 1.0, range(len(network.blocks)))
    for index in state.blocks:
        state.forward(index, autocast)
        yield from answers_at(state, index, autocast, scored_only)
        state.runs.clear()


def answers_at(
    state: Pass, index: int, autocast: torch.dtype | None, scored_only: bool
) -> Iterator[tuple[Span, Term | None, Any]]:
    """What every head behind block ``index`` answers, the model's own included; see `local_outputs`."""
    network = state.network
    features = state.values[network.blocks[index].outputs[0]]
    for span, auxiliary in network.auxiliaries_at(index + 1):
        wanted = [
            (t, h) for (t, _), h in zip(auxiliary.terms, auxiliary.heads, strict=True) if t.scored or not scored_only
        ]
        with precision(network.device, autocast):
            bridged = auxiliary.bridged(features) if wanted else features
            outputs = [(term, head(bridged)) for term, head in wanted]
        for term, output in outputs:
            yield span, term, output
    if index == len(network.blocks) - 1:
        own = next(span for span in network.spans(0) if span.stop == len(network.blocks))
        yield own, None, features
