"""What one forward in training mode did, on autograd's clock: calls of modules, and the graph as numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localgrad.batches import tensors_in
from localgrad.partition.units import Key, others_of
from localgrad.suspension.frames import held_by_frames

Value = tuple[int, int]  # an output of a node: (index of the node, number of the output)


class Taken(NamedTuple):
    """A tensor among the arguments of a call: which leaf of them, in which argument, and what made it."""

    leaf: int
    key: Key
    value: Any
    shape: tuple[int, ...]


@dataclass
class Call:
    """One call of a module: when it began and ended on the clock, what it took and returned."""

    name: str
    number: int
    enter: int
    exit: int = 0
    taken: list[Taken] = field(default_factory=list)
    returned: list[tuple[Any, tuple[int, ...]]] = field(default_factory=list)
    reads: tuple[int, ...] = ()  # shape of the first tensor taken, with or without a graph
    makes: tuple[int, ...] = ()
    frames: dict[Any, str] = field(default_factory=dict)
    others: dict[Key, Any] = field(default_factory=dict)
    same: dict[Key, tuple[Any, ...]] = field(default_factory=dict)  # what tells the tensors of an argument from others
    watched: dict[int, tuple[Tensor, int]] = field(default_factory=dict)  # leaf and its version when the call began
    overwritten: frozenset[int] = frozenset()
    structured: bool = False
    stray: bool = False
    differentiable: bool = True  # whether it ran with gradients


def clock() -> int:
    """The number that autograd gives its next node."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).clone().grad_fn
        assert node is not None
        return int(node._sequence_nr())


class Listener:
    """Hooks on every module, for one forward."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self.numbers: dict[str, int] = {}
        self.running: list[Call] = []
        self.kept: list[Tensor] = []
        self.hooks = []
        for name, module in model.named_modules():
            if name:
                self.hooks += [
                    module.register_forward_pre_hook(self._before(name), with_kwargs=True, prepend=True),
                    module.register_forward_hook(self._after(name), always_call=False),
                ]

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            torch.clear_autocast_cache()  # as at every cut; a weight that several calls read would cross as its cast
            number = self.numbers[name] = self.numbers.get(name, -1) + 1
            call = Call(name, number, clock(), differentiable=torch.is_grad_enabled())
            # A module that is called where its path does not lead is shared by several others.
            call.stray = bool(self.running) and not name.startswith(self.running[-1].name + ".")
            given: list[tuple[Key, Any]] = [*enumerate(args), *kwargs.items()]
            call.reads = next((tuple(t.shape) for _, value in given for t in tensors_in(value)), ())
            leaves = [(key, leaf) for key, value in given for leaf in tree_leaves(value)]
            for place, (key, leaf) in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    call.taken.append(Taken(place, key, (leaf.grad_fn, leaf.output_nr), tuple(leaf.shape)))
            if call.taken and torch.is_grad_enabled():
                tensors = ((place, leaf) for place, (_, leaf) in enumerate(leaves) if isinstance(leaf, Tensor))
                call.watched = {place: (leaf, leaf._version) for place, leaf in tensors}
                call.others = others_of(args, kwargs)
                call.same = {key: self._identity(value) for key, value in given if tensors_in(value)}
                for tag, tensor in held_by_frames(sys._getframe(1)):
                    call.frames.setdefault((tensor.grad_fn, tensor.output_nr), ":".join(tag[1:3]))
            self.calls.append(call)
            self.running.append(call)

        return hook

    def _identity(self, value: Any) -> tuple[Any, ...]:
        tensors = tensors_in(value)
        self.kept += [tensor for tensor in tensors if tensor.grad_fn is None]  # so that no other takes its place
        return tuple(id(t) if t.grad_fn is None else (t.grad_fn, t.output_nr) for t in tensors)

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            while self.running and self.running[-1].name != name:
                self.running.pop()  # it raised, and somebody caught that
            if not self.running:
                return
            call = self.running.pop()
            call.exit = clock()
            tensors = tensors_in(output)
            call.structured = not isinstance(output, Tensor)
            call.makes = tuple(tensors[0].shape) if tensors else ()
            call.returned = [((t.grad_fn, t.output_nr), tuple(t.shape)) for t in tensors if t.grad_fn is not None]

        return hook

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class Graph:
    """Autograd's graph as lists of numbers: it may be kept, since it holds no tensor."""

    def __init__(self, outputs: Sequence[Any], names: dict[int, str]) -> None:
        found: set[Any] = set()
        stack = [node for node, _ in outputs]
        while stack:
            if (node := stack.pop()) is not None and node not in found and not hasattr(node, "variable"):
                found.add(node)
                stack += [following for following, _ in node.next_functions]
        nodes = sorted(found, key=lambda node: node._sequence_nr())
        self.index = {node: i for i, node in enumerate(nodes)}
        self.times = [node._sequence_nr() for node in nodes]
        self.kinds = [node.name() for node in nodes]
        self.inputs: list[list[Value]] = []
        self.reads: dict[Value, list[int]] = {}
        self.readers: dict[str, list[int]] = {}
        self.own: dict[int, list[str]] = {}  # node -> parameters it reads
        for i, node in enumerate(nodes):
            self.inputs.append([value for edge in node.next_functions if (value := self.value(edge)) is not None])
            for value in self.inputs[i]:
                self.reads.setdefault(value, []).append(self.times[i])
            for following, _ in node.next_functions:
                if (name := names.get(id(getattr(following, "variable", None)))) is not None:
                    self.readers.setdefault(name, []).append(self.times[i])
                    self.own.setdefault(i, []).append(name)
        for node, slot in outputs:
            self.reads.setdefault((self.index[node], slot), []).append(1 << 62)
        self.order = sorted(self.readers, key=lambda name: min(self.readers[name]))
        self.first_reads = [min(self.readers[name]) for name in self.order]
        self.last_reads = sorted(max(reads) for reads in self.readers.values())
        rank = {name: 1 << k for k, name in enumerate(self.order)}
        self.bits: list[int] = []  # of each node, the parameters it is computed from
        self.ancestors: list[int] = []
        for i in range(len(nodes)):
            bits, above = 0, 1 << i
            for name in self.own.get(i, ()):
                bits |= rank[name]
            for j, _ in self.inputs[i]:
                bits |= self.bits[j]
                above |= self.ancestors[j]
            self.bits.append(bits)
            self.ancestors.append(above)

    def value(self, edge: Any) -> Value | None:
        """What a tensor is an output of; None if no loss reads it."""
        index = self.index.get(edge[0])
        return None if index is None else (index, edge[1])

    def forget(self) -> None:
        """Let go of the nodes, and with them of what they saved."""
        self.index = {}
