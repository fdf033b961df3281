"""One rank of block parallel: executes its rows of the timetable, with what it takes, sends, returns and collects."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localgrad.balance import Count, whole
from localgrad.batches import num_samples, parts_of
from localgrad.distributed.compression import Wire
from localgrad.distributed.crossing import Blocks, Place, RankBlocks, entered, handed_on, received
from localgrad.distributed.custody import Custody, named_tensors, tensors_by_rank
from localgrad.distributed.gradient_order import InOrder
from localgrad.distributed.link import GRADIENTS, VALUES, Inlet, Message, Outlet
from localgrad.distributed.remote_twins import RemoteTwins
from localgrad.distributed.rows import Runs, acts, rank_table
from localgrad.distributed.timeline import Timeline
from localgrad.distributed.trees import decoded, encoded
from localgrad.engine import balance_of, in_context
from localgrad.errors import ConfigError, TrainingError
from localgrad.method import Term
from localgrad.network import LocalNetwork
from localgrad.opened import OpenModel
from localgrad.partition import INPUTS
from localgrad.passes import OnOutput, Pass, answers_at
from localgrad.spans import Span, groups
from localgrad.suspension.points import Watch
from localgrad.task import Batch, alone
from localgrad.timetable import Row, timetable


def _losses(network: LocalNetwork) -> Iterator[Any]:
    """Every loss of a method, and what it consists of."""
    method = network.method
    left: list[Any] = [method.final_loss or method.task.loss, *(term.loss for term in method.terms)]
    while left:
        part = left.pop()
        yield part
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            left += [getattr(part, f.name) for f in dataclasses.fields(part)]


@dataclass
class _Part:
    """One micro-batch on its way through this rank.

    ``rows`` are its samples and those of the whole batch; ``received`` and ``sent`` are the places of the tensors that
    crossed a boundary with a gradient to come back; ``factor`` is that of the task's loss, see `localgrad.balance`.
    """

    state: Pass
    rows: tuple[int, int]
    received: list[Place] = field(default_factory=list)
    sent: list[Place] = field(default_factory=list)
    factor: Tensor | None = None


def _sent(factor: Tensor | None, count: Count, key: Hashable, least: float) -> Tensor | float:
    """The factor that the first rank found for the task's loss, see `localgrad.balance`."""
    if key != "targets" or factor is None:
        raise TrainingError(
            "this loss divides by what it finds in outputs (FCOS: anchors on objects), which ranks that see one "
            "micro-batch at a time cannot tell of the others; use parts=1 and one replica, or RetinaNet"
        )
    return factor


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
        all_blocks: of the network, each to be called by itself.
        group: the ranks along the blocks, in order.
        runs: the blocks of each of them.
        depth, wire: see `block_parallel`.

    Attributes:
        rank, size: of the group.
        blocks: those of this rank; ``model`` runs them.
        twins: those here whose units are on other ranks, and the units here that twins elsewhere follow.
        custody: who trains which tensor.
        timeline: when each block ran; notes nothing unless asked to.
    """

    def __init__(
        self,
        network: LocalNetwork,
        all_blocks: Blocks,
        group: dist.ProcessGroup,
        runs: Runs,
        depth: int,
        wire: Wire = "same",
    ) -> None:
        self.network, self.group, self.runs, self.wire = network, group, runs, wire
        self.rank, self.size = group.rank(), group.size()
        self.blocks = self.runs[self.rank]
        self.model = RankBlocks(all_blocks, self.blocks)
        self.timeline = Timeline()
        self._inputs_read = any(getattr(part, "reads_inputs", False) for part in _losses(network))
        self._step: int | None = None
        self._evaluated = 0
        self._open = True
        before, after, device = self.rank - 1, self.rank + 1, network.device
        first, last = before < 0, after == self.size
        patterns = network.method.spans.patterns(network.num_blocks)
        crossed = {b for spans in patterns for s in spans for b in range(s.start + 1, s.stop)}
        back, forth = self.blocks.start in crossed, self.blocks.stop in crossed
        self._values_in = None if first else Inlet(group, before, VALUES, depth, device)
        self._values_out = None if last else Outlet(group, after, VALUES, depth)
        self._gradients_in = Inlet(group, after, GRADIENTS, depth, device) if forth else None
        # The rank before takes gradients only after all its micro-batches have run: sending them must not wait.
        self._gradients_out = Outlet(group, before, GRADIENTS, depth, waits=False) if back else None
        rank_of = {k: rank for rank, run in enumerate(runs) for k in run}
        owners = tensors_by_rank(network, all_blocks, rank_of)
        self.twins = RemoteTwins(network, group, self._boundaries, owners, rank_of, depth, self.timeline)
        self.custody = Custody(group, owners, self.twins.followed)

    @property
    def _boundaries(self) -> range:
        """Those whose auxiliary networks are trained here."""
        return range(self.blocks.start + 1, min(self.blocks.stop, self.network.num_blocks - 1) + 1)

    @property
    def modules(self) -> list[nn.Module]:
        """What is trained here: blocks, and the auxiliary networks behind them."""
        auxiliary = [aux for b in self._boundaries for _, aux in self.network.auxiliaries_at(b)]
        return [*self.model.blocks, *auxiliary]

    def tensors(self, followed: bool = False) -> dict[str, Tensor]:
        """Parameters and buffers of what is trained here, by their names in the network.

        With ``followed`` also those of other ranks' units that twins here follow.
        """
        own = {id(tensor) for module in self.modules for tensor in named_tensors(module).values()}
        if followed:
            own |= {id(tensor) for tensors in self.twins.followed.values() for tensor in tensors}
        return {name: tensor for name, tensor in named_tensors(self.network).items() if id(tensor) in own}

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
        if training:
            self._begin(step)
        message = None if self._values_in is None else self._take_values(step, 0)
        with self._opened(spans) as opened:
            begun = self._begun(opened, inputs, targets, step, autocast) if message is None else {}
            parts = len(begun) if message is None else message.said["parts"]
            late = any(rule.late for rule in network.rules)
            options = {"late": late, "training": training}
            rows = rank_table(spans, self.runs, self.rank, parts, **options)
            gradients = InOrder(network, rows, timetable(spans, network.num_blocks, parts, **options))
            table = list(acts(rows))
            last = {row.part: place for place, (row, _) in enumerate(table)}
            current: _Part | None = None
            for place, (row, ways) in enumerate(table):
                if row.do == "take":
                    message = message or self._take_values(step, row.part)
                    begun[row.part] = self._entered(opened, message, step, autocast)
                    message = None
                part = begun[row.part]
                if current is not None and current is not part:
                    self._leave(current)
                part.state.unpark()
                current = part
                if row.do == "forward":
                    with self.timeline.during("forward", step, row.part, row.block):
                        part.state.run(row.block)
                elif row.do == "send":
                    self._send(part, step, parts)
                elif row.do == "loss":
                    assert row.span is not None
                    self.twins.move_due(row.span.stop)
                    with self.timeline.during("loss", step, row.part, row.block):
                        yield from part.state.yielded(row.span, on_output)
                        gradients.back(part.state, ways)
                elif row.do == "collect":
                    part.state.forward.close()
                    self._collect(part, row, step)
                    with self.timeline.during("back", step, row.part, row.block):
                        gradients.back(part.state, ways)
                elif row.do == "return":
                    self._return(part, row, step)
                elif row.do == "twins":
                    self.twins.move_early(row.block + 1, step)
                elif row.do == "done":
                    gradients.add_up(row.block)
                    on_block_done(row.block)
                if place == last[row.part]:  # let go: its targets share the memory of all that came with them
                    part.state.forward.close()
                    del begun[row.part], part
                    current = None

    @contextlib.contextmanager
    def _opened(self, spans: Sequence[Span]) -> Iterator[OpenModel]:
        """Inside it, forwards of the blocks here can be begun; see `LocalNetwork.opened`."""
        waits = [k for k in self.blocks if any(s.covers(k) and s.stop > k + 1 for s in spans)]
        again = waits if self.network.method.recompute.blocks else []
        self.model.again = [k - self.blocks.start for k in again]
        self.model.selective = self.network.method.recompute.selective
        watch, device = Watch(frames=True), self.network.device.type
        with OpenModel(self.model, self.model, self.model.points, watch, device) as opened:
            yield opened

    def _leave(self, part: _Part) -> None:
        """Let what a part will go on with wait, as `localgrad.engine.execute` does, while another part runs."""
        wait = self.network.method.accumulate.wait
        if part.state.boundary >= self.blocks.stop:
            part.state.forward.close()  # it holds what was sent
        elif wait != "device":
            part.state.park(wait)

    def _begin(self, step: int) -> None:
        if not self._open:
            raise TrainingError("this network's links are closed: call network.stage.close() after the last step only")
        if self._step is not None:
            raise TrainingError(
                f"step {self._step} was trained, but localgrad.exchange(network) was not called before step {step}; "
                "with block_parallel it sends weights that other ranks wait for. Call it after optimizer.step()"
            )
        self._step = step

    def _pass(
        self, opened: OpenModel, batch: Batch, part: int, share: float, autocast: torch.dtype | None, values: Any
    ) -> Pass:
        replicas = self.network.replicas if torch.is_grad_enabled() else None
        batch = dataclasses.replace(batch, joined=alone if replicas is None else replicas.joined)
        batch = in_context(self.network, batch, part, autocast)
        spans = self.network.spans(batch.step) if torch.is_grad_enabled() else ()
        return Pass(self.network, opened, spans, batch, part, share, autocast, self.blocks, (values,))

    def _begun(
        self, opened: OpenModel, inputs: Any, targets: Any, step: int, autocast: torch.dtype | None
    ) -> dict[int, _Part]:
        """The micro-batches of a step on the first rank, cut from the batch."""
        if inputs is None:
            raise TrainingError("the first rank of the blocks was given None as inputs; it reads the data for all")
        total = num_samples(inputs) or 1
        self._count(step, total)
        begun = {}
        parts = parts_of(inputs, targets, self.network.method.accumulate.parts, self.network.partition.example)
        balance = balance_of(inputs, targets, len(parts), self.network.replicas if torch.is_grad_enabled() else None)
        for part, (x, y, share) in enumerate(parts):
            batch = (
                Batch(x, y, step) if balance is None else Batch(x, y, step, balance=balance.of(y, num_samples(x) or 1))
            )
            state = self._pass(opened, batch, part, share, autocast, {INPUTS: x})
            begun[part] = _Part(state, (num_samples(x) or 1, total), factor=self._factor(batch))
        return begun

    def _factor(self, batch: Batch) -> Tensor | None:
        """What later ranks, which see the targets of one part at a time, multiply the task's loss by."""
        counted = getattr(self.network.method.task, "counted", None)
        factor = None if counted is None else batch.balance(counted, "targets", 0.0)
        return factor if isinstance(factor, Tensor) else None

    def _entered(self, opened: OpenModel, message: Message, step: int, autocast: torch.dtype | None) -> _Part:
        """A micro-batch that the rank before sent."""
        said, tensors = message.said, message.tensors
        rows, total = said["rows"]
        if message.part == 0:
            self._count(step, total)
        values = received(said, tensors)
        x, y = (decoded(said[name], tensors) for name in (INPUTS, "targets"))
        if x is not None:
            values[INPUTS] = x
        factor = decoded(said["factor"], tensors)
        alone = said["parts"] == 1 and self.network.replicas is None
        batch = Batch(_NotSent() if x is None else x, y, step, balance=whole if alone else partial(_sent, factor))
        state = self._pass(opened, batch, message.part, rows / total, autocast, values)
        return _Part(state, (rows, total), entered(state, said, tensors), factor=factor)

    def _count(self, step: int, samples: int) -> None:
        if self.network.replicas is not None and torch.is_grad_enabled():
            self.network.replicas.count(step, samples)

    def _take_values(self, step: int, part: int) -> Message:
        assert self._values_in is not None
        message = self._values_in.take(step, part)
        self.timeline.received(message.stamp)
        self.timeline.note("received", step, part)
        return message

    def _send(self, part: _Part, step: int, parts: int) -> None:
        """Send what later ranks read, before anything else is done here."""
        assert self._values_out is not None
        state, stop = part.state, self.blocks.stop
        edges = [group.stop for group in groups(state.spans, self.network.num_blocks)]
        waits = parts > 1 and stop in edges and self.network.method.accumulate.wait == "bf16"
        tensors: list[Tensor] = []
        said, part.sent = handed_on(state, tensors, self.wire, "bf16" if waits else "same")
        read = self._inputs_read or self.model.read_elsewhere(INPUTS)
        said |= {
            "parts": parts,
            "rows": part.rows,
            INPUTS: encoded(state.batch.inputs, tensors, "inputs") if read else None,
            "targets": encoded(state.batch.targets, tensors, "targets"),
            "factor": encoded(part.factor, tensors, "factor"),
        }
        self.timeline.note("sent", step, state.part)
        self._values_out.send(step, state.part, said, tensors, self.timeline.arrival(VALUES))

    def _return(self, part: _Part, row: Row, step: int) -> None:
        """Send back what a way left at values from other ranks."""
        assert self._gradients_out is not None
        outgoing, part.state.outgoing = part.state.outgoing, {}
        gradients = [outgoing[maker][slot] if maker in outgoing else None for maker, slot in part.received]
        said = {"start": row.start, "present": [gradient is not None for gradient in gradients]}
        tensors = [gradient for gradient in gradients if gradient is not None]
        self._gradients_out.send(step, row.part, said, tensors, self.timeline.arrival(GRADIENTS))

    def _collect(self, part: _Part, row: Row, step: int) -> None:
        """Put gradients that another rank sent where a backward pass there would have left them."""
        assert self._gradients_in is not None
        message = self._gradients_in.take(step, row.part)
        self.timeline.received(message.stamp)
        assert message.said["start"] == row.start
        tensors = iter(message.tensors)
        for (maker, slot), present in zip(part.sent, message.said["present"], strict=True):
            if present:
                part.state.graphs[maker].gradients[slot] = next(tensors)

    def local_outputs(
        self, inputs: Any, autocast: torch.dtype | None, scored_only: bool
    ) -> Iterator[tuple[Span, Term | None, Any]]:
        """See `localgrad.local_outputs`: the heads at the boundaries of this rank."""
        step = -1 - self._evaluated  # no step of training, so that neither is taken for the other
        self._evaluated += 1
        message = None if self._values_in is None else self._take_values(step, 0)
        with self._opened(()) as opened:
            if message is not None:
                part = self._entered(opened, message, 0, autocast)
            else:
                rows = num_samples(inputs) or 1
                state = self._pass(opened, Batch(inputs, None, 0), 0, 1.0, autocast, {INPUTS: inputs})
                part = _Part(state, (rows, rows))
            for block in self.blocks:
                part.state.run(block)
                if block == self.blocks[-1] and self._values_out is not None:
                    self._send(part, step, 1)
                self.twins.move_due(block + 1)
                yield from answers_at(part.state, block, scored_only)

    def close(self) -> None:
        """End the links, when every rank has trained its last step; waits for the neighbours to do the same.

        Raises:
            TrainingError: a neighbour has trained more steps, or is gone.
        """
        if not self._open:
            return
        self._open = False
        self.twins.settle()
        inlets = [i for i in (self._values_in, self._gradients_in, *self.twins.inlets.values()) if i is not None]
        outlets = [o for o in (self._values_out, self._gradients_out, *self.twins.outlets.values()) if o is not None]
        for outlet in outlets:
            outlet.close()
        for inlet in inlets:
            inlet.finish()
        for outlet in outlets:
            outlet.finish()

    def exchange(self) -> None:
        """See `localgrad.exchange`: also sends the weights that twins on other ranks follow."""
        step, self._step = self._step, None
        if step is not None:
            self.twins.exchange(step)

    def settle(self) -> None:
        """Move every twin as far as it would have moved in one process by now: before saving, for instance."""
        self.twins.settle()

    @property
    def follows(self) -> bool:
        """Whether twins follow units on other ranks, here or elsewhere along the blocks."""
        return self.twins.any

    def gather(self) -> None:
        """Give every rank all parameters and buffers; ``network`` is then an ordinary network again on each of them.

        Closes the links. Optimizers know only the parameters they were built with.

        Raises:
            ConfigError: blocks are sharded.
        """
        if self.network.replicas is not None and self.network.replicas.shard:
            raise ConfigError("blocks are sharded (shard=True); save with Checkpoints and load that into a new network")
        self.close()
        self.custody.gather()
        self.network.stage = None

    @property
    def bytes_sent(self) -> dict[str, int]:
        """Bytes of tensors over each kind of link so far."""
        return {
            "values": 0 if self._values_out is None else self._values_out.bytes,
            "gradients": 0 if self._gradients_out is None else self._gradients_out.bytes,
            "weights": sum(outlet.bytes for outlet in self.twins.outlets.values()),
        }
