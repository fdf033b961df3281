"""From a model to graphs of its parts, by torch.fx.

Only the modules that contain the points where parts begin are traced through, so that everything else stays the model's
own module, with its mode, its dropout and any batch size.
"""

from __future__ import annotations

import random
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from localgrad.errors import PartitionError
from localgrad.suspension.points import Point
from localgrad.suspension.untouched import untouched

ROOT = "model"
INPUTS = "inputs"
OUTPUT = "output"

Names = tuple[str, ...]


class _Root(nn.Module):
    """Calls the model, so that torch.fx sees default arguments of its ``forward`` as the constants they are."""

    def __init__(self, model: nn.Module, num_inputs: int | None) -> None:
        super().__init__()
        self.model = model
        self.num_inputs = num_inputs

    def forward(self, inputs: Any) -> Any:
        if self.num_inputs is None:
            return self.model(inputs)
        return self.model(*[inputs[i] for i in range(self.num_inputs)])


def _opaque_functions() -> tuple[Callable[..., Any], ...]:
    """Functions that timm declares untraceable."""
    if "timm.models" not in sys.modules:  # then the model has none of them, and importing it would take seconds
        return ()
    from timm.models import _features_fx

    return tuple(_features_fx.get_notrace_functions())


class _Tracer(fx.Tracer):
    """Traces through the modules ``through``, and remembers where each of ``points`` begins and the features there."""

    def __init__(self, points: Sequence[Point], through: Collection[str], record_buffers: bool) -> None:
        super().__init__(autowrap_functions=_opaque_functions())
        self.points, self.through = {point.name: point for point in points}, through
        self.proxy_buffer_attributes = record_buffers
        self.entered: dict[str, tuple[int, Any]] = {}  # point -> number of nodes before, features
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name != ROOT and module_qualified_name.removeprefix(ROOT + ".") not in self.through

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        path = name.removeprefix(ROOT).removeprefix(".")
        if path in self.points and path not in self.entered:
            leaves = dict(enumerate(tree_leaves((args, kwargs))))
            self.entered[path] = len(self.graph.nodes), leaves.get(self.points[path].leaf)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        self.inside.append(path)
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result


def trace(
    model: nn.Module, example: Any, points: Sequence[Point], through: Collection[str], training: bool
) -> list[tuple[fx.GraphModule, Names, Names]]:
    """The parts of ``model`` that begin at ``points`` (and one before them) in one mode, in the order they run.

    Args:
        model: shared with the graphs.
        example: a tensor, or a tuple of them for several inputs.
        points: where parts begin and which argument the features are; whatever else crosses is passed on by name.
        through: paths of the modules to look inside, among them those that contain points.
        training: the mode.

    Returns:
        for each part a graph, the names of the values it reads and of those it returns, the features first.

    Raises:
        PartitionError: a module to look inside cannot be traced, or does not come by each point.
    """
    tracer = _traced(model, len(example) if isinstance(example, (tuple, list)) else None, points, through, training)
    mode = "training" if training else "eval"
    for point in points:
        if point.name not in tracer.entered:
            raise PartitionError(f"module {point.name!r} is not reached in {mode} mode; cut the model elsewhere")
        if not isinstance(tracer.entered[point.name][1], fx.Proxy):
            raise PartitionError(f"in {mode} mode {point.name!r} takes no features; cut the model elsewhere")
    entered = [tracer.entered[point.name] for point in points]
    nodes = list(tracer.graph.nodes)
    edges = [0, *(position for position, _ in entered), len(nodes)]
    ends = [*(features.node for _, features in entered), None]
    return [_part(tracer.root, nodes, *part) for part in zip(pairwise(edges), ends, strict=True)]


def _traced(
    model: nn.Module, num_inputs: int | None, points: Sequence[Point], through: Collection[str], training: bool
) -> _Tracer:
    # What is computed from buffers alone is recorded; frozen into the graph only where a forward branches on buffers.
    for record_buffers in (True, False):
        tracer = _Tracer(points, through, record_buffers)
        try:
            with untouched(model, training), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                before = _positions()
                tracer.trace(_Root(model, num_inputs))
                drawn = before != _positions()
        except Exception as error:  # a forward may fail in any way when it is given proxies
            if record_buffers:
                continue
            raise PartitionError(_untraceable(model, "".join(tracer.inside[-1:]), error)) from error
        if drawn:
            raise PartitionError(
                f"{type(model).__name__} draws random numbers of a fixed size (torch.rand(...), random.random()) in a "
                "forward that has to be traced, so every step would see the same draw. Move the draw into a module of "
                "its own, or pass a list of modules that run one after the other."
            )
        break
    return tracer


def _positions() -> tuple[Any, ...]:
    """How far the generators of torch, ``random`` and numpy have come."""
    _, words, *position = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(words).tobytes(), position


def _part(
    root: nn.Module, nodes: list[fx.Node], edges: tuple[int, int], features: fx.Node | None
) -> tuple[fx.GraphModule, Names, Names]:
    """The nodes between ``edges`` as a module, which makes ``features``, or the model's output."""
    start, stop = edges
    body = [node for node in nodes[start:stop] if node.op in ("call_module", "call_function", "call_method")]
    inside, later = set(body), set(nodes[stop:])
    ends = nodes[-1].all_input_nodes if features is None else [features]
    reads = [*(arg for node in body for arg in node.all_input_nodes), *ends]
    inputs = list(dict.fromkeys(node for node in reads if node not in inside and node.op != "get_attr"))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copy_of)  # an attribute of the model, fetched where it is used
        return copies[node]

    for node in body:
        copies[node] = graph.node_copy(node, copy_of)
    if features is None:
        result: Any = (fx.map_arg(nodes[-1].args[0], copy_of),)
        names: Names = (OUTPUT,)
    else:
        crossing = dict.fromkeys([features, *(node for node in body if not later.isdisjoint(node.users))])
        result, names = tuple(copies[node] for node in crossing), tuple(node.name for node in crossing)
    graph.output(result)
    graph.lint()
    return fx.GraphModule(root, graph, class_name="BlockGraph"), tuple(node.name for node in inputs), names


def _where(error: Exception) -> str:
    """The line of the model's code that failed, and why."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/fx/" not in frame.filename and frame.filename != __file__
    ]
    where = "an unknown line"
    if frames:  # where a package is installed is of no interest
        file = frames[-1].filename.rpartition("site-packages/")[2]
        where = f"{file}:{frames[-1].lineno} `{frames[-1].line}`"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{where} depends on the values of its input ({reason})"


def _untraceable(model: nn.Module, path: str, error: Exception) -> str:
    whose = f"module {path!r} of {type(model).__name__}" if path else f"{type(model).__name__}.forward"
    children = [name for name, _ in model.named_children()]
    return (
        f"{whose} cannot be traced: {_where(error)}. "
        "Pass the model as a list of modules that run one after the other: localize(model, method, ["
        + ", ".join(f"model.{name}" for name in children[:3])
        + ("" if len(children) <= 3 else ", ...")
        + "], example=...)."
    )
