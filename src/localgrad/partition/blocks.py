"""Blocks: consecutive parts of a model that share its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx, nn

from localgrad.errors import PartitionError
from localgrad.partition.trace import ROOT, Names, trace
from localgrad.recompute.parts import recomputed
from localgrad.suspension.points import Point


class _Named(nn.Module):
    """Reads values by name and makes others, in the mode of the model; ``names`` by training mode."""

    def __init__(self, model: nn.Module, names: dict[bool, tuple[Names, Names]]) -> None:
        super().__init__()
        self._model = (model,)  # a tuple, so that it is no child
        self._names = names

    def names(self, training: bool) -> tuple[Names, Names]:
        """Names of the values it reads and of those it makes, in one mode."""
        return self._names[training]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values it reads, in the order of the arguments of ``forward``."""
        return self.names(self._model[0].training)[0]

    @property
    def owner(self) -> nn.Module:
        """The module whose buffers it moves: the whole model, of which it may read some by name."""
        return self._model[0]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the values it makes, in the order ``forward`` returns them; the first are the features."""
        return self.names(self._model[0].training)[1]


class Block(_Named):
    """One part of a model: values by name in, values by name out.

    The graph is kept for both modes, because a ``forward`` may read ``self.training``; the mode is the model's, whoever
    set it.

    Args:
        model: whose mode and parameters are used; not registered as a child.
        graphs: training mode -> the module to run, its input names and its output names.
    """

    def __init__(self, model: nn.Module, graphs: dict[bool, tuple[fx.GraphModule, Names, Names]]) -> None:
        super().__init__(model, {mode: (inputs, outputs) for mode, (_, inputs, outputs) in graphs.items()})
        self.train_graph, self.eval_graph = graphs[True][0], graphs[False][0]
        self._links = _tensor_links(self.train_graph) + _tensor_links(self.eval_graph)
        self._device = _device(model)  # where constants were when they were recorded

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """Run it; returns one value for each name in ``outputs``."""
        model = self._model[0]
        for graph, path in self._links:
            _relink(graph, path, model)
        if self._device != (device := _device(model)):
            self._move_constants(device)
        return (self.train_graph if model.training else self.eval_graph)(*values)

    def _move_constants(self, device: torch.device | None) -> None:
        """Tensors that a traced ``forward`` made without any input follow the model from device to device."""
        for graph in (self.train_graph, self.eval_graph):
            for name, value in list(graph._buffers.items()):
                if value is not None and value.device == self._device:
                    graph._buffers[name] = value.to(device)
        self._device = device


class RecomputedBlock(_Named):
    """Blocks that run one behind the other as one; each but the last is run again in the backward pass.

    What waits for the backward pass is then the features between them, and what one of them saves.

    Args:
        model: whose mode is used.
        parts: in the order they run.
        read_later: names of values that later blocks read, by training mode.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Block], read_later: dict[bool, set[str]]) -> None:
        super().__init__(model, {mode: _joined_names(parts, mode, read_later[mode]) for mode in (True, False)})
        self.parts = tuple(parts)
        self._registered = nn.ModuleList(parts)

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """Run it; returns one value for each name in ``outputs``."""
        known = dict(zip(self.inputs, values, strict=True))
        for index, part in enumerate(self.parts):
            arguments = [known[name] for name in part.inputs]
            again = torch.is_grad_enabled() and index < len(self.parts) - 1
            known |= zip(
                part.outputs, recomputed(part, *arguments, owner=part.owner) if again else part(*arguments), strict=True
            )
        return tuple(known[name] for name in self.outputs)


def _joined_names(parts: Sequence[Block], training: bool, read_later: set[str]) -> tuple[Names, Names]:
    made: dict[str, None] = {}
    inputs: dict[str, None] = {}
    for part in parts:
        reads, returns = part.names(training)
        inputs |= dict.fromkeys(name for name in reads if name not in made)
        made |= dict.fromkeys(returns)
    features = parts[-1].names(training)[1][0]
    return tuple(inputs), (features, *(name for name in made if name in read_later and name != features))


def _tensor_links(graph: fx.GraphModule) -> list[tuple[fx.GraphModule, str]]:
    """Tensors the graph holds outside submodules: ``model.to(...)`` replaces buffers, so they are looked up anew."""
    paths = dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr")
    return [(graph, path) for path in paths if path.startswith(ROOT + ".")]


def _device(model: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), None)


def _relink(graph: fx.GraphModule, path: str, model: nn.Module) -> None:
    *parents, name = path.removeprefix(ROOT + ".").split(".")
    holder, source = graph.get_submodule(".".join([ROOT, *parents])), model.get_submodule(".".join(parents))
    value = getattr(source, name)
    if getattr(holder, name) is not value:
        setattr(holder, name, value)


def split(model: nn.Module, example: Any, points: Sequence[Point], through: Collection[str]) -> list[Block]:
    """Blocks that begin at ``points`` (and one before them), in the order they run; see `trace`.

    Raises:
        PartitionError: they cannot be traced, or a parameter is used by two of them.
    """
    train, evaluation = (trace(model, example, points, through, training) for training in (True, False))
    blocks = [Block(model, {True: one, False: other}) for one, other in zip(train, evaluation, strict=True)]
    check_shared_parameters(model, blocks, [point.name for point in points])
    return blocks


def join(model: nn.Module, parts: Sequence[Block], sizes: Sequence[int]) -> list[Block | RecomputedBlock]:
    """Blocks of ``sizes`` consecutive parts each; those of several run all but their last part again."""
    blocks: list[Block | RecomputedBlock] = []
    stop = 0
    for size in sizes:
        start, stop = stop, stop + size
        later = {mode: {name for part in parts[stop:] for name in part.names(mode)[0]} for mode in (True, False)}
        blocks.append(parts[start] if size == 1 else RecomputedBlock(model, parts[start:stop], later))
    return blocks


def check_shared_parameters(model: nn.Module, blocks: Sequence[nn.Module], points: Sequence[str]) -> None:
    """Raise `PartitionError` if two blocks use the same parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            first = owner.setdefault(id(parameter), index)
            if first != index:
                raise PartitionError(
                    f"parameter {names.get(id(parameter), '?')!r} is used by block {first} and by block {index} (from "
                    f"{points[index - 1]!r}): two losses would train it. Untie it (copy.deepcopy), or cut so that both "
                    "uses are in one block."
                )
