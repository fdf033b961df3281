"""From any ``nn.Module`` to its cut points and blocks, by torch.fx.

A full trace is used for *analysis* only: it finds the places that a single tensor with gradient crosses. The *blocks*
are made by tracing only through the ancestors of the chosen points, so that everything else stays the model's own
module, with its mode, its dropout and any batch size.
"""

from __future__ import annotations

import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict

from localgrad.errors import PartitionError
from localgrad.suspension.untouched import untouched

ROOT = "model"
Taps = Sequence[str] | Literal["auto"]


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


def _library_leaves() -> tuple[tuple[type[nn.Module], ...], tuple[Callable[..., Any], ...]]:
    """Modules and functions that timm and torchvision declare untraceable."""
    modules: list[type[nn.Module]] = []
    functions: list[Callable[..., Any]] = []
    # A library that was never imported has no module in the model; importing it would take seconds.
    if "torchvision.ops" in sys.modules:
        members = (member for _, member in inspect.getmembers(sys.modules["torchvision.ops"], inspect.isclass))
        modules += [m for m in members if issubclass(m, nn.Module) and not issubclass(m, nn.Sequential)]
    if "timm.models" in sys.modules:
        from timm.models import _features_fx

        modules += _features_fx.get_notrace_modules()
        functions += _features_fx.get_notrace_functions()
    return tuple(modules), tuple(functions)


class _Tracer(fx.Tracer):
    """Traces through every module but those ``is_leaf`` names, and remembers where each module was entered and left."""

    def __init__(self, is_leaf: Callable[[nn.Module, str], bool], autowrap: tuple[Callable[..., Any], ...]) -> None:
        super().__init__(autowrap_functions=autowrap)
        self._is_leaf = is_leaf
        self.entered: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.returned: dict[str, fx.Node] = {}
        self.structured: set[str] = set()
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name != ROOT and self._is_leaf(m, module_qualified_name.removeprefix(ROOT + "."))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        path = name.removeprefix(ROOT).removeprefix(".")
        caller = self.inside[-1] if self.inside else ""
        if not caller or path.startswith(caller + "."):  # else it is shared, and called where its path does not lead
            self.entered.setdefault(path, len(self.graph.nodes))
        if self.is_leaf_module(m, name):
            result = super().call_module(m, forward, args, kwargs)
        else:
            self.inside.append(path)
            result = super().call_module(m, forward, args, kwargs)
            self.inside.pop()
        if path in self.entered:
            self.left.setdefault(path, len(self.graph.nodes))
        if isinstance(result, fx.Proxy):
            self.returned.setdefault(path, result.node)
        else:
            self.structured.add(path)
        return result


@dataclass
class Trace:
    """A traced model.

    Args:
        graph: nodes in the order they run.
        entered: module path -> number of nodes before its first call began; ``left`` before it had ended.
        returned: module path -> the node it returned.
        structured: paths of modules that returned several values; torch.fx must see each, so they are never kept whole.
        differentiable: nodes whose values carry gradient, once `note_values` has run.
    """

    root: nn.Module
    graph: fx.Graph
    entered: dict[str, int]
    left: dict[str, int]
    returned: dict[str, fx.Node]
    structured: set[str] = field(default_factory=set)
    differentiable: set[fx.Node] = field(default_factory=set)

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    def crossing(self, position: int) -> list[fx.Node]:
        """Values made before ``position`` and used from there on, attributes of the model left out."""
        nodes = self.nodes
        before = set(nodes[:position])
        return [
            node
            for node in nodes[:position]
            if node.op != "get_attr" and any(user not in before for user in node.users)
        ]

    def features(self, position: int, taps: Taps) -> list[fx.Node]:
        """Values with gradient that cross ``position``, taps left out; the last tap if only taps cross.

        Taps are those that modules ``taps`` returned and those `_tapped` recognises; with ``auto`` whatever the
        features are computed from.
        """
        carrying = [node for node in self.crossing(position) if node in self.differentiable]
        if taps == "auto":
            return carrying[-1:] if carrying and set(carrying) <= _sources(carrying[-1]) else carrying
        named = {self.returned.get(tap) for tap in taps}
        left = [node for node in carrying if node not in named] or carrying[-1:]
        return left[-1:] if len(left) > 1 and self._tapped(position, left[:-1], left[-1]) else left

    def _tapped(self, position: int, others: list[fx.Node], features: fx.Node) -> bool:
        """Whether ``others`` only wait for a later head, while all goes on from ``features``, the youngest value.

        So it is in encoders whose stages are read again by a decoder or a feature pyramid: what runs next reads the
        features, they were computed from each of the others, and each other one are maps of finer resolution, or
        nothing reads it before the model's own child that runs at ``position`` has ended. The input of a module that is
        still running, such as the shortcut of a residual unit, does not wait for a head.
        """
        nodes = self.nodes
        index = {node: k for k, node in enumerate(nodes)}
        running = [path for path, start in self.entered.items() if path and start < position < self.left[path]]
        end = min((self.left[path] for path in running if "." not in path), default=position)

        def reads_first(start: int, values: Collection[fx.Node]) -> list[fx.Node]:
            reading = ([v for v in n.all_input_nodes if v in values] for n in nodes[start:] if n in self.differentiable)
            return next(filter(None, reading), [])

        if features not in reads_first(position, {*others, features}):
            return False
        sources = _sources(features)
        for other in others:
            uses = [index[user] for user in other.users if index[user] >= position]
            finer = _side(other, self) > _side(features, self) > 0
            if other not in sources or not (finer or (end > position and min(uses) >= end)):
                return False
            for path in running:
                entry = self.entered[path]
                if index[other] < entry and min(uses) < self.left[path]:
                    entering = [n for n in self.crossing(entry) if n in self.differentiable]
                    if other in reads_first(entry, entering):
                        return False
        return True


def _side(node: fx.Node, traced: Trace) -> int:
    """Height of maps in positions; 0 for other values."""
    shape = node.meta.get("shape", ())
    return 0 if len(shape) != 4 else shape[1] if channels_hint(node, traced) == "last" else shape[2]


def _sources(node: fx.Node) -> set[fx.Node]:
    """The node and everything that it is computed from."""
    found, queue = {node}, [node]
    while queue:
        new = [source for source in queue.pop().all_input_nodes if source not in found]
        found.update(new)
        queue += new
    return found


def trace(
    model: nn.Module,
    num_inputs: int | None,
    *,
    training: bool = False,
    through: Collection[str] | None = None,
    structured: Collection[str] = (),
) -> Trace:
    """Trace ``model``, wholly or only through the modules ``through``, and ``structured`` ones directly inside those.

    A module whose ``forward`` cannot be traced is kept whole; if one of ``through`` cannot, `PartitionError`
    says where.
    """
    library_modules, library_functions = _library_leaves()
    default = fx.Tracer()
    opaque: set[str] = set()  # modules that cannot be traced and are kept whole
    # What is computed from buffers alone is recorded; frozen into the graph only where a forward branches on buffers.
    record_buffers = True

    def is_leaf(module: nn.Module, path: str) -> bool:
        if path in opaque:
            return True
        if through is not None:
            return path not in through and path not in structured
        return isinstance(module, library_modules) or default.is_leaf_module(module, path)

    while True:
        root = _Root(model, num_inputs)
        tracer = _Tracer(is_leaf, library_functions)
        tracer.proxy_buffer_attributes = record_buffers
        try:
            with untouched(model, training), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                before = torch.get_rng_state()
                graph = tracer.trace(root)
                drawn = not torch.equal(before, torch.get_rng_state())
        except Exception as error:  # a forward may fail in any way when it is given proxies
            culprit = next((path for path in reversed(tracer.inside) if path), "")
            if not culprit or (through is not None and culprit in through):
                if record_buffers:
                    record_buffers = False
                    continue
                raise PartitionError(_untraceable(model, culprit, error)) from error
            opaque.add(culprit)
            continue
        if drawn and through is not None:
            raise PartitionError(
                f"{type(model).__name__} draws random numbers of a fixed size (torch.rand(...), say) in a forward that "
                "has to be traced, so every step would see the same draw. Move the draw into a module of its own, or "
                "pass a list of modules that run one after the other."
            )
        return Trace(root, graph, tracer.entered, tracer.left, tracer.returned, tracer.structured)


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


class _Values(fx.Interpreter):
    """Runs a trace on an example and notes the shape of each value and whether it carries a gradient."""

    def __init__(self, traced: Trace) -> None:
        super().__init__(traced.root, graph=traced.graph)
        self.traced = traced

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return _mutable(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        floating = any(
            isinstance(t, Tensor) and t.is_floating_point()
            for t in (result if isinstance(result, (tuple, list)) else [result])
        )
        if floating and n.op != "placeholder" and (self._has_parameters(n) or self._reads_differentiable(n)):
            self.traced.differentiable.add(n)
        return result

    def _has_parameters(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return any(True for _ in self.module.get_submodule(str(node.target)).parameters())
        return node.op == "get_attr" and isinstance(attribute(self.traced.root, str(node.target)), nn.Parameter)

    def _reads_differentiable(self, node: fx.Node) -> bool:
        return any(arg in self.traced.differentiable for arg in node.all_input_nodes)


def _mutable(value: Any) -> Any:
    """Lists and dicts as a module gets them outside a graph: it may append to them."""
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    if type(value) in (dict, immutable_dict):  # a dict of another kind may have attributes, as transformers' outputs do
        return {key: _mutable(item) for key, item in value.items()}
    return tuple(_mutable(item) for item in value) if type(value) is tuple else value


def attribute(root: nn.Module, target: str) -> Any:
    """What a ``get_attr`` node fetches."""
    value: Any = root
    for name in target.split("."):
        value = getattr(value, name)
    return value


def note_values(traced: Trace, model: nn.Module, example: Any) -> None:
    """Fill in shapes and ``differentiable`` by running ``example`` in eval mode."""
    with untouched(model, False), torch.no_grad():
        _Values(traced).run(example)


def channels_hint(node: fx.Node, traced: Trace, limit: int = 12) -> Literal["first", "last"] | None:
    """Where the layers next to a value look for channels, by the first one with weights downstream, else upstream."""
    shape = node.meta.get("shape", ())
    if len(shape) != 4 or shape[1] == shape[3]:
        return None
    ways: tuple[Callable[[fx.Node], Collection[fx.Node]], ...] = (lambda n: n.users, lambda n: n.all_input_nodes)
    for step in ways:
        seen, queue = {node}, list(step(node)) if step(node) else []
        for _ in range(limit):
            if not queue:
                break
            current = queue.pop(0)
            if current in seen:
                continue
            seen.add(current)
            if current.op == "call_module":
                module = traced.root.get_submodule(str(current.target))
                if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)):
                    return "first"
                if isinstance(module, (nn.Linear, nn.LayerNorm)):
                    width = module.weight.shape[-1]
                    return "last" if width == shape[3] and width != shape[1] else "first"
            queue += list(step(current))
    return "last" if shape[1] == shape[2] != shape[3] else None
