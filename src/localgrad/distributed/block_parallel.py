"""Blocks of one network on different ranks: features travel forward, gradients back only where a span crosses."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from localgrad.distributed.agreement import agree, explained, facts_about
from localgrad.distributed.compression import Wire
from localgrad.distributed.data_parallel import axis, digest_of
from localgrad.distributed.gradient_order import InOrder, kept
from localgrad.distributed.link import Inlet, Message, Outlet
from localgrad.distributed.ownership import shipments, tensors_by_rank
from localgrad.distributed.placement import runs_of
from localgrad.distributed.timeline import Timeline
from localgrad.distributed.trees import decoded, encoded
from localgrad.engine import OnOutput, Pass, Run, answers_at, parts_of
from localgrad.errors import ConfigError, MethodError, TrainingError, nearest
from localgrad.method import Batch, Term, alone
from localgrad.network import LocalNetwork
from localgrad.partition import INPUTS
from localgrad.spans import Span

VALUES, GRADIENTS, WEIGHTS = range(3)  # channels between two ranks


def block_parallel(
    network: LocalNetwork,
    mesh: DeviceMesh,
    *,
    place: Sequence[int] | None = None,
    depth: int = 2,
    wire: Wire = "same",
) -> LocalNetwork:
    """Keep some of the blocks of ``network`` on each rank of ``mesh`` and let the others be trained elsewhere.

    The loop stays as it is: every rank runs it, for as many steps, with a call of `localgrad.exchange` after each
    optimizer step, and calls ``network.stage.close()`` behind it. Only the first rank's inputs and targets are looked
    at; the others may pass None. Weights are bit for bit those of a single process with the same batches, under
    `localgrad.keyed_randomness` also with dropout:

    - Features, and the targets, are sent as soon as the last block of a rank has run forward, before its loss and
      backward pass. Batches are trained in order and each message is taken once, so nothing is ever stale.
    - Where a span crosses ranks (windows, guided steps, end-to-end training), its gradient comes back. A rank runs all
      micro-batches of a step forward before it waits for the first gradient: give such methods several,
      ``methods.accumulation(method, parts=4)``.
    - Where a bridge has twins of units on a later rank, that rank sends their weights after each step. A twin that
      moves ``after`` the step keeps the next step's loss waiting for them; one that moves ``before`` it has a step of
      slack.

    Parameters of the other ranks' blocks are given up: they become NaN, take no memory, and need no gradient. Build
    optimizers afterwards. ``network.stage.gather()`` puts them back.

    Args:
        network: from `localize`, with equal arguments and weights on every rank.
        mesh: of one dimension, or with one called ``block``.
        place: the rank of each block along that dimension, ``[0, 0, 1, 1]``; None gives each rank about equally many
            parameters in training. `localgrad.distributed.placement.balanced` makes one from measured costs.
        depth: batches a rank may be ahead of the next one; each takes memory for one batch of features on both.
        wire: ``same`` sends features as they are; ``bf16`` or ``int8`` in fewer bytes, see
            `localgrad.distributed.compression.compressed`. Blocks behind a boundary between ranks are then trained and
            evaluated on rounded features: weights are no longer those of a single process. Targets, and weights that
            twins follow, are never rounded.

    Returns:
        the same network; ``network.stage`` is its `Stage`.

    Raises:
        ConfigError: ranks differ, there are more of them than blocks, or a placement is not in order.
        MethodError: the method computes something over all blocks, or between blocks, that does not travel; or
            ``wire`` would round features whose gradient comes back.

    Source: forward-only pipelines of local learning: Decoupled Greedy Learning (Belilovsky et al., ICML 2020,
    arXiv:1901.08164, synchronous form); windows as in interlocking back-propagation (Gomez et al., JMLR 23(171), 2022).
    Differs: equal to a single process by construction; nothing is replayed, recomputed for sending or used twice.
    """
    group = axis(mesh, "block").get_group()
    runs = runs_of(network, group.size(), place)
    if depth < 1:
        raise ConfigError(f"depth={depth}; at least one batch has to travel, depth=2 lets the next one follow")
    check_method(network, runs)
    check_wire(network, runs, wire)
    with explained("comparing networks"):
        weights = digest_of(network.parameters()).tolist()
        options = {"weights": f"{weights}", "placement": f"{runs}", "depth": f"{depth}", "wire": wire}
        agree(group, facts_about(network) | options)
    network.stage = Stage(network, group, runs, depth, wire)
    return network


def _losses(network: LocalNetwork) -> Iterator[Any]:
    """Every loss of a method, and what it consists of."""
    method = network.method
    left: list[Any] = [method.final_loss or method.task.loss, *(term.loss for term in method.terms)]
    while left:
        part = left.pop()
        yield part
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            left += [getattr(part, f.name) for f in dataclasses.fields(part)]


def check_method(network: LocalNetwork, runs: Sequence[range]) -> None:
    """Raise `MethodError` if a method needs something of other ranks that is not sent."""
    method = network.method
    reasons = {
        "computes something over the whole model before each batch (a teacher's answer, say)": bool(method.contexts),
        "compares the gradients of neighbouring blocks": method.reconcile is not None,
        "lets heads follow the loss at the next boundary": any(term.follows for term in method.terms),
        "compares the answers of neighbouring heads": any(
            getattr(p, "reads_previous", False) for p in _losses(network)
        ),
        "moves buffers of twins between micro-batches": method.micro_batches > 1
        and any(twin.exchange == "before" and twin.buffers != "none" for twin in network.twins),
    }
    for reason, holds in reasons.items():
        if holds and len(runs) > 1:
            raise MethodError(
                f"{method.name} {reason}, which does not travel between ranks; train it in one process or with "
                "localgrad.distributed.data_parallel"
            )


def check_wire(network: LocalNetwork, runs: Sequence[range], wire: Wire) -> None:
    """Raise if ``wire`` is not known, or would round features through which a gradient has to come back."""
    if wire not in get_args(Wire):
        raise ConfigError(nearest(wire, get_args(Wire), "wire"))
    if wire == "same":
        return
    for run in runs[1:]:
        for span in (s for pattern in network.method.spans.patterns(len(network.blocks)) for s in pattern):
            if span.start < run.start < span.stop:
                raise MethodError(
                    f"wire={wire!r} rounds the features that block {run.start} receives from another rank, but "
                    f"{network.method.name} trains blocks {span.start} to {span.stop - 1} together, so a gradient "
                    "comes back there. Write wire='same', or place these blocks on one rank (place=...)"
                )


@dataclass
class _Part:
    """One micro-batch on its way through this rank.

    ``rows`` are its samples and those of the whole batch; ``received`` and ``sent`` name, by maker and place, the
    values that crossed a boundary with a gradient to come back.
    """

    state: Pass
    parts: int
    rows: tuple[int, int]
    received: list[tuple[int, int]]
    sent: list[tuple[int, int]] = field(default_factory=list)

    @property
    def last(self) -> bool:
        return self.state.part == self.parts - 1


class _NotSent:
    """Stands for inputs that were not sent to a rank."""

    def __getattr__(self, name: str) -> Any:
        raise TrainingError(
            "a loss reads batch.inputs, which were not sent to this rank; give it an attribute reads_inputs = True"
        )


class Stage:
    """The blocks of one rank and its links to the others; ``network.stage``.

    Args:
        network: of which some blocks are trained here.
        group: the ranks along the blocks, in order.
        runs: the blocks of each of them.
        depth, wire: see `block_parallel`.

    Attributes:
        rank, size: of the group.
        blocks: those of this rank.
        timeline: when each block ran; notes nothing unless asked to.
    """

    def __init__(
        self, network: LocalNetwork, group: dist.ProcessGroup, runs: Sequence[range], depth: int, wire: Wire = "same"
    ) -> None:
        self.network, self.group, self.runs, self.wire = network, group, list(runs), wire
        self.rank, self.size = group.rank(), group.size()
        self.blocks = self.runs[self.rank]
        self.timeline = Timeline()
        self._rank_of = {k: rank for rank, run in enumerate(runs) for k in run}
        self._inputs_read = any(getattr(part, "reads_inputs", False) for part in _losses(network))
        self._step: int | None = None
        self._evaluated = 0
        self._open = True
        before, after, device = self.rank - 1, self.rank + 1, network.device
        first, last = before < 0, after == self.size
        patterns = network.method.spans.patterns(len(network.blocks))
        crossed = {b for spans in patterns for s in spans for b in range(s.start + 1, s.stop)}
        back, forth = self.blocks.start in crossed, self.blocks.stop in crossed
        self._values_in = None if first else Inlet(group, before, VALUES, depth, device)
        self._values_out = None if last else Outlet(group, after, VALUES, depth)
        self._gradients_in = Inlet(group, after, GRADIENTS, depth, device) if forth else None
        # The rank before takes gradients only after all its micro-batches have run: sending them must not wait.
        self._gradients_out = Outlet(group, before, GRADIENTS, depth, waits=False) if back else None
        owner_of = {id(tensor): rank for tensor, rank in tensors_by_rank(network, self._rank_of).items()}
        self._sources = {
            twin: next((owner_of[id(p)] for p in twin.source.parameters()), self.rank)
            for boundary in self._boundaries
            for twin in network.twins_at(boundary)
        }
        sent = shipments(network, self._rank_of)
        self._shipped = {s.reader: s.tensors for s in sent if s.owner == self.rank}
        self._followed = {s.owner: s.tensors for s in sent if s.reader == self.rank}
        self._weights_out = {reader: Outlet(group, reader, WEIGHTS, depth) for reader in self._shipped}
        self._weights_in = {owner: Inlet(group, owner, WEIGHTS, depth, device) for owner in self._followed}
        self._coming: dict[int, deque[int]] = {owner: deque() for owner in self._followed}
        self._due: dict[int, int] = {}
        self._given_up: dict[Tensor, tuple[tuple[int, ...], bool]] = {}
        self._give_up()

    @property
    def _boundaries(self) -> range:
        """Those whose auxiliary networks are trained here."""
        return range(self.blocks.start + 1, min(self.blocks.stop, len(self.network.blocks) - 1) + 1)

    @property
    def modules(self) -> list[nn.Module]:
        """What is trained here: blocks, and the auxiliary networks behind them."""
        auxiliary = [aux for b in self._boundaries for _, aux in self.network.auxiliaries_at(b)]
        return [*(self.network.blocks[k] for k in self.blocks), *auxiliary]

    @property
    def follows(self) -> bool:
        """Whether twins follow units on other ranks, here or elsewhere along the blocks."""
        return bool(shipments(self.network, self._rank_of))

    def tensors(self, followed: bool = False) -> dict[str, Tensor]:
        """Parameters and buffers of what is trained here, by their names in the network.

        With ``followed`` also those of other ranks' units that twins here follow.
        """
        own = {id(t) for module in self.modules for t in (*module.parameters(), *module.buffers())}
        if followed:
            own |= {id(tensor) for tensors in self._followed.values() for tensor in tensors}
        named = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        return {name: tensor for name, tensor in named.items() if id(tensor) in own}

    @torch.no_grad()
    def _give_up(self) -> None:
        """Free what other ranks train, but for what twins here follow."""
        kept = {id(tensor) for tensors in self._followed.values() for tensor in tensors}
        for tensor, rank in tensors_by_rank(self.network, self._rank_of).items():
            if rank == self.rank:
                continue
            self._given_up[tensor] = tensor.stride(), tensor.requires_grad
            tensor.requires_grad_(False)
            if id(tensor) not in kept:
                nothing = float("nan") if tensor.is_floating_point() else 0
                tensor.data = torch.full((), nothing, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)

    # One step -----------------------------------------------------------------------------------------------------

    def local_losses(
        self,
        inputs: Any,
        targets: Any,
        step: int,
        autocast: torch.dtype | None,
        on_output: OnOutput | None,
        on_block_done: Callable[[int], None],
    ) -> Iterator[tuple[Span, Tensor]]:
        """See `localgrad.local_losses`: the losses at the boundaries of this rank."""
        network, training = self.network, torch.is_grad_enabled()
        spans = network.spans(step)
        ends = {s.start: max(t.stop for t in spans if t.start == s.start) for s in spans}
        returning = [s for s in ends if s < self.blocks.stop < ends[s]] if training else []
        if training:
            self._begin(step)
        # Where there are several micro-batches, a block that gradients from another rank reach gets them in another
        # order than in one process.
        late = [k for k in self.blocks if any(start <= k for start in returning)]
        gradients: InOrder | None = None
        waiting: list[_Part] = []
        for part in self._parts(inputs, targets, step, spans):
            state = part.state
            if gradients is None and late and part.parts > 1:
                gradients = InOrder(network, late)
            for index in self.blocks:
                with self.timeline.during("forward", step, state.part, index):
                    state.forward(index, autocast)
                if index == self.blocks[-1]:
                    self._send(part, step)
                finished: list[int] = []
                for span in (s for s in state.spans if s.stop == index + 1):
                    self._move_due_twins(span.stop)
                    with self.timeline.during("loss", step, state.part, index):
                        yield span, state.loss(span, autocast, on_output)
                        if training:
                            with kept(gradients, (state.part, ends[span.start], -span.start)):
                                finished += state.back(span)
                    self._send_gradients(part, span.start, step)
                if training and part.last:
                    self._move_early_twins(index + 1, step)
                    for block in finished:
                        on_block_done(block)
                state.runs = {
                    k: run for k, run in state.runs.items() if k < self.blocks.start or state.passes_left[k] > 0
                }
            if returning:
                state.values.clear()
                waiting.append(part)
        for _ in range(len(returning) * len(waiting)):
            part, start = self._take_gradients(waiting, step)
            with (
                self.timeline.during("back", step, part.state.part, self.blocks[-1]),
                kept(gradients, (part.state.part, ends[start], -start)),
            ):
                finished = part.state.way_back(start, self.blocks[-1])
            self._send_gradients(part, start, step)
            for block in finished if part.last else []:
                if gradients is not None:
                    gradients.add_up(block)
                on_block_done(block)

    def _begin(self, step: int) -> None:
        if not self._open:
            raise TrainingError("this network's links are closed: call network.stage.close() after the last step only")
        if self._step is not None:
            raise TrainingError(
                f"step {self._step} was trained, but localgrad.exchange(network) was not called before step {step}; "
                "with block_parallel it sends weights that other ranks wait for. Call it after optimizer.step()"
            )
        self._step = step

    def _parts(self, inputs: Any, targets: Any, step: int, spans: Sequence[Span]) -> Iterator[_Part]:
        """The micro-batches of a step: cut from the batch on the first rank, received on the others."""
        network = self.network
        replicas = network.replicas if torch.is_grad_enabled() else None
        joined = alone if replicas is None else replicas.joined
        if self._values_in is None:
            if inputs is None:
                raise TrainingError("the first rank of the blocks was given None as inputs; it reads the data for all")
            total = len(tree_leaves(inputs)[0])
            if replicas is not None:
                replicas.count(step, total)
            cut = parts_of(inputs, targets, network.method.micro_batches)
            for part, (x, y, share) in enumerate(cut):
                state = Pass(network, spans, Batch(x, y, step, joined=joined), part, share, self.blocks)
                yield _Part(state, len(cut), (len(tree_leaves(x)[0]), total), [])
            return
        part, parts = 0, 1
        while part < parts:
            message = self._take_values(step, part)
            parts, (rows, total) = message.said["parts"], message.said["rows"]
            if part == 0 and replicas is not None:
                replicas.count(step, total)
            x, y = (decoded(message.said[name], message.tensors) for name in ("inputs", "targets"))
            batch = Batch(_NotSent() if x is None else x, y, step, joined=joined)
            state = Pass(network, spans, batch, part, rows / total, self.blocks)
            yield _Part(state, parts, (rows, total), self._enter(state, message))
            part += 1

    def _take_values(self, step: int, part: int) -> Message:
        assert self._values_in is not None
        message = self._values_in.take(step, part)
        self.timeline.received(message.stamp)
        self.timeline.note("received", step, part)
        return message

    @staticmethod
    def _enter(state: Pass, message: Message) -> list[tuple[int, int]]:
        """Put values that another rank sent where a block before would have put them; says which carry a gradient."""
        carried = set(message.said["carried"])
        for index in carried:
            message.tensors[index].requires_grad_()
        received: list[tuple[int, int]] = []
        made: dict[int, dict[str, Any]] = {}
        for name, maker, code in message.said["values"]:
            made.setdefault(maker, {})[name] = decoded(code, message.tensors)
            slots = sum(known == maker for known, _ in received)
            indices = [content for kind, content in code["leaves"] if kind == "tensor" and content in carried]
            received += [(maker, slots + n) for n in range(len(indices))]
        for maker, values in made.items():
            run = state.runs[maker] = Run(tuple(values.values()))
            for name, value in zip(values, run.values, strict=True):
                state.values[name], state.maker[name] = value, maker
            del run.values
        return received

    def _send(self, part: _Part, step: int) -> None:
        """Send what later ranks read, before anything else is done here."""
        if self._values_out is None:
            return
        state, last = part.state, self.blocks[-1]
        tensors: list[Tensor] = []
        values = []
        carried = []
        for name, value in state.values.items():
            if name == INPUTS or self.network.last_reader(name) <= last:
                continue
            maker, first = state.maker[name], len(tensors)
            values.append([name, maker, encoded(value, tensors, name, self.wire)])
            crossed = any(s.start <= maker and s.stop > last + 1 for s in state.spans)
            for index, leaf in enumerate(tensors[first:] if crossed and torch.is_grad_enabled() else (), start=first):
                slot = state.runs[maker].slots.get(id(leaf))
                if slot is not None:
                    carried.append(index)
                    part.sent.append((maker, slot))
        read = self._inputs_read or self.network.last_reader(INPUTS) > last
        said = {
            "parts": part.parts,
            "rows": part.rows,
            "values": values,
            "carried": carried,
            "inputs": encoded(state.batch.inputs, tensors, "inputs") if read else None,
            "targets": encoded(state.batch.targets, tensors, "targets"),
        }
        self.timeline.note("sent", step, state.part)
        self._values_out.send(step, state.part, said, tensors, self.timeline.arrival(VALUES))

    def _send_gradients(self, part: _Part, start: int, step: int) -> None:
        """Send back what a backward pass left at values from other ranks, if it did reach them."""
        outgoing, part.state.outgoing = part.state.outgoing, {}
        if start >= self.blocks.start or not outgoing or self._gradients_out is None:
            return
        gradients = [outgoing.get(maker, {slot: None})[slot] for maker, slot in part.received]
        said = {"start": start, "present": [gradient is not None for gradient in gradients]}
        tensors = [gradient for gradient in gradients if gradient is not None]
        self._gradients_out.send(step, part.state.part, said, tensors, self.timeline.arrival(GRADIENTS))

    def _take_gradients(self, waiting: Sequence[_Part], step: int) -> tuple[_Part, int]:
        """Put gradients that another rank sent where a backward pass there would have left them."""
        assert self._gradients_in is not None
        message = self._gradients_in.take(step)
        self.timeline.received(message.stamp)
        part, tensors = waiting[message.part], iter(message.tensors)
        for (maker, slot), present in zip(part.sent, message.said["present"], strict=True):
            if present:
                part.state.runs[maker].gradients[slot] = next(tensors)
        return part, message.said["start"]

    # Twins --------------------------------------------------------------------------------------------------------

    def exchange(self) -> None:
        """See `localgrad.exchange`: also sends the weights that twins on other ranks follow."""
        step, self._step = self._step, None
        if step is None:
            return
        for reader, outlet in self._weights_out.items():
            outlet.send(step, 0, None, self._shipped[reader], self.timeline.arrival(WEIGHTS))
        for boundary in list(self._due):
            self._move_due_twins(boundary)
        for coming in self._coming.values():
            coming.append(step)
        for boundary in self._boundaries:
            for twin in self.network.twins_at(boundary):
                if twin.exchange == "after" and self._sources[twin] == self.rank:
                    twin.update()
                elif twin.exchange == "after":
                    self._due[boundary] = step

    @torch.no_grad()
    def _load(self, owner: int, upto: int) -> None:
        """Take the weights another rank had after the steps before and at ``upto``."""
        coming = self._coming.get(owner, deque())
        while coming and coming[0] <= upto:
            message = self._weights_in[owner].take(coming.popleft())
            self.timeline.received(message.stamp)
            for tensor, new in zip(self._followed[owner], message.tensors, strict=True):
                tensor.copy_(new)

    def _move_due_twins(self, boundary: int) -> None:
        """Move the twins that should have moved after the step before, now that somebody looks through them."""
        step = self._due.pop(boundary, None)
        if step is None:
            return
        for twin in self.network.twins_at(boundary):
            if twin.exchange == "after" and self._sources[twin] != self.rank:
                self._load(self._sources[twin], step)
                twin.update()

    def _move_early_twins(self, boundary: int, step: int) -> None:
        """Move those that move before the optimizer step, towards the weights after the step before."""
        if boundary in self._boundaries:
            for twin in self.network.twins_at(boundary):
                if twin.exchange == "before" and self._sources[twin] != self.rank:
                    self._load(self._sources[twin], step - 1)
            self.network.exchange_before_step(boundary)

    def settle(self) -> None:
        """Move every twin as far as it would have moved in one process by now: before saving, for instance."""
        for boundary in list(self._due):
            self._move_due_twins(boundary)
        for owner, coming in self._coming.items():
            if coming:
                self._load(owner, coming[-1])

    # Evaluation, the end ------------------------------------------------------------------------------------------

    def local_outputs(
        self, inputs: Any, autocast: torch.dtype | None, scored_only: bool
    ) -> Iterator[tuple[Span, Term | None, Any]]:
        """See `localgrad.local_outputs`: the heads at the boundaries of this rank."""
        step = -1 - self._evaluated  # no step of training, so that neither is taken for the other
        self._evaluated += 1
        if self._values_in is None:
            rows = len(tree_leaves(inputs)[0])
            part = _Part(Pass(self.network, (), Batch(inputs, None, 0), 0, 1.0, self.blocks), 1, (rows, rows), [])
        else:
            message = self._take_values(step, 0)
            batch = Batch(decoded(message.said["inputs"], message.tensors), None, 0)
            state = Pass(self.network, (), batch, 0, 1.0, self.blocks)
            part = _Part(state, 1, message.said["rows"], self._enter(state, message))
        for index in self.blocks:
            part.state.forward(index, autocast)
            if index == self.blocks[-1]:
                self._send(part, step)
            self._move_due_twins(index + 1)
            yield from answers_at(part.state, index, autocast, scored_only)
            part.state.runs.clear()

    def close(self) -> None:
        """End the links, when every rank has trained its last step; waits for the neighbours to do the same.

        Raises:
            TrainingError: a neighbour has trained more steps, or is gone.
        """
        if not self._open:
            return
        self._open = False
        self.settle()
        inlets = [i for i in (self._values_in, self._gradients_in, *self._weights_in.values()) if i is not None]
        outlets = [o for o in (self._values_out, self._gradients_out, *self._weights_out.values()) if o is not None]
        for outlet in outlets:
            outlet.close()
        for inlet in inlets:
            inlet.finish()
        for outlet in outlets:
            outlet.finish()

    @torch.no_grad()
    def gather(self) -> None:
        """Give every rank all parameters and buffers; ``network`` is then an ordinary network again on each of them.

        Closes the links. Optimizers know only the parameters they were built with.

        Raises:
            ConfigError: blocks are sharded.
        """
        if self.network.replicas is not None and self.network.replicas.shard:
            raise ConfigError("blocks are sharded (shard=True); save with Checkpoints and load that into a new network")
        self.close()
        for tensor, (strides, trained) in self._given_up.items():
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                tensor.data = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
            tensor.requires_grad_(trained)
        with explained("gathering the network"):
            for tensor, rank in tensors_by_rank(self.network, self._rank_of).items():
                data = tensor.detach().contiguous()
                dist.broadcast(data, dist.get_global_rank(self.group, rank), group=self.group)
                tensor.detach().copy_(data)
        self.network.stage = None

    @property
    def bytes_sent(self) -> dict[str, int]:
        """Bytes of tensors over each kind of link so far."""
        return {
            "values": 0 if self._values_out is None else self._values_out.bytes,
            "gradients": 0 if self._gradients_out is None else self._gradients_out.bytes,
            "weights": sum(outlet.bytes for outlet in self._weights_out.values()),
        }
