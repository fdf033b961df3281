"""One training step of any network by any method: executes a timetable over the model's own, suspended forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from localgrad.balance import Balance, whole
from localgrad.batches import num_samples, parts_of, positional
from localgrad.boundary import stopped
from localgrad.errors import TrainingError
from localgrad.method import Term
from localgrad.passes import OnOutput, Pass, answers_at, precision
from localgrad.randomness import draws_of
from localgrad.rehearsal import follow_unfrozen
from localgrad.spans import Span
from localgrad.task import Batch, alone
from localgrad.timetable import Row, timetable

if TYPE_CHECKING:
    from localgrad.network import LocalNetwork
    from localgrad.ranks import Replicas


def local_losses(
    network: LocalNetwork,
    inputs: Any,
    targets: Any,
    step: int = 0,
    *,
    autocast: torch.dtype | None = None,
    on_output: OnOutput | None = None,
    on_block_done: Callable[[int], None] | None = None,
) -> Generator[tuple[Span, Tensor], None, None]:
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
        PartitionError: if the first step, or the first one after weights were unfrozen, shows that a loss would train a
            parameter outside its span.

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
    inputs = positional(inputs)
    training = torch.is_grad_enabled()
    if training:
        follow_unfrozen(network)
    spans = network.spans(step)
    replicas = network.replicas if training else None

    def announce(block: int) -> None:
        if on_block_done is not None:
            on_block_done(block)
        network.ended(block)

    reducing = contextlib.nullcontext(announce) if replicas is None else replicas.reducing(step, announce)
    with network.stepping(), reducing as done:
        if network.stage is not None:
            yield from network.stage.local_losses(inputs, targets, step, autocast, on_output, done)
            return
        parts = parts_of(inputs, targets, network.method.accumulate.parts, network.partition.example)
        if replicas is not None:
            replicas.count(step, num_samples(inputs) or 1)
        joined = alone if replicas is None else replicas.joined
        balance = balance_of(inputs, targets, len(parts), replicas)
        with network.opened(spans) as opened:
            passes = []
            for part, (x, y, share) in enumerate(parts):
                weighed = whole if balance is None else balance.of(y, num_samples(x) or 1)
                batch = in_context(network, Batch(x, y, step, joined=joined, balance=weighed), part, autocast)
                passes.append(Pass(network, opened, spans, batch, part, share, autocast))
            late = any(rule.late for rule in network.rules)
            table = timetable(spans, network.num_blocks, len(parts), late=late, training=training)
            yield from execute(network, table, passes, on_output, done)
    network.checked |= {(spans, network.trains)} if training else set()


def balance_of(inputs: Any, targets: Any, parts: int, replicas: Replicas | None) -> Balance | None:
    """What losses divide by in this step; None where the batch is in one part on one replica."""
    if replicas is None:
        return None if parts == 1 else Balance(targets, num_samples(inputs) or 1)
    return Balance(targets, replicas.samples, replicas.joined)


def require_network(network: Any, caller: str) -> None:
    """Raise `TrainingError` if a wrapper was put around a network, which would be passed by."""
    from localgrad.network import LocalNetwork

    if not isinstance(network, LocalNetwork):
        raise TrainingError(
            f"{caller} got a {type(network).__name__}; it takes what localgrad.localize(model, method, ...) returns, "
            "no model and no wrapper: instead of DistributedDataParallel or torch.compile around a network write "
            "localgrad.distributed.data_parallel(network, mesh) or network.compile_blocks()"
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
    late: list[int] = []  # blocks that a forward joined to later ones
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
            late.append(row.block)
        complete = [block for block in late if not any(each.covers(block) for each in passes)]
        late = [block for block in late if block not in complete]
        for block in complete:
            done(block)


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
    with network.stepping(), network.opened(()) as opened:
        one = Pass(network, opened, (), Batch(inputs, None, 0), autocast=autocast)
        for block in one.blocks:
            one.run(block)
            yield from answers_at(one, block, scored_only)


@torch.no_grad()
def features(network: LocalNetwork, inputs: Any) -> Iterator[Any]:
    """The features behind each block, then the model's output; mode is the caller's business."""
    require_network(network, "features")
    with network.stepping(), network.opened(()) as opened:
        one = Pass(network, opened, (), Batch(inputs, None, 0))
        for block in one.blocks:
            one.run(block)
            yield one.forward.features
