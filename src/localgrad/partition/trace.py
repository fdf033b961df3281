"""From any ``nn.Module`` to its cut points and blocks, by torch.fx.

A full trace is used for *analysis* only: it finds the places that a single tensor with gradient crosses. The *blocks* are
made by tracing only through the ancestors of the chosen points, so that everything else stays the model's own module, with
its mode, its dropout and any batch size.
"""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from localgrad.errors import PartitionError

ROOT = "model"


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
    try:
        import torchvision.ops
    except (ImportError, RuntimeError):
        pass
    else:
        members = (member for _, member in inspect.getmembers(torchvision.ops, inspect.isclass))
        modules += [m for m in members if issubclass(m, nn.Module) and not issubclass(m, nn.Sequential)]
    try:
        from timm.models import _features_fx
    except ImportError:
        pass
    else:
        modules += _features_fx.get_notrace_modules()
        functions += _features_fx.get_notrace_functions()
    return tuple(modules), tuple(functions)


class _Tracer(fx.Tracer):
    """Traces through every module but those ``is_leaf`` names, and remembers where each module was entered and left."""

    def __init__(self, is_leaf: Callable[[nn.Module, str], bool], autowrap: tuple[Callable[..., Any], ...]) -> None:
        super().__init__(autowrap_functions=autowrap)
        self._is_leaf = is_leaf
        self.entered: dict[str, int] = {}
        self.returned: dict[str, fx.Node] = {}
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name != ROOT and self._is_leaf(m, module_qualified_name.removeprefix(ROOT + "."))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m).removeprefix(ROOT).removeprefix(".")
        self.entered.setdefault(path, len(self.graph.nodes))
        self.inside.append(path)
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        if isinstance(result, fx.Proxy):
            self.returned.setdefault(path, result.node)
        return result


@dataclass
class Trace:
    """A traced model.

    Args:
        graph: nodes in the order they run.
        entered: module path -> number of nodes before its first call began.
        returned: module path -> the node it returned.
    """

    root: nn.Module
    graph: fx.Graph
    entered: dict[str, int]
    returned: dict[str, fx.Node]
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


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module in one mode and, on exit, each back into its own."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def trace(
    model: nn.Module,
    num_inputs: int | None,
    *,
    training: bool = False,
    through: Collection[str] | None = None,
) -> Trace:
    """Trace ``model``, wholly or only through the modules at the paths ``through``.

    A module whose ``forward`` cannot be traced is kept whole; if the model's own cannot, `PartitionError` names the line.
    """
    library_modules, library_functions = _library_leaves()
    default = fx.Tracer()
    opaque: set[str] = set()

    def is_leaf(module: nn.Module, path: str) -> bool:
        if path in opaque:
            return True
        if through is not None:
            return path not in through
        return isinstance(module, library_modules) or default.is_leaf_module(module, path)

    while True:
        root = _Root(model, num_inputs)
        tracer = _Tracer(is_leaf, library_functions)
        try:
            with _mode(model, training), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = tracer.trace(root)
        except Exception as error:  # a forward may fail in any way when it is given proxies
            culprit = next((path for path in reversed(tracer.inside) if path), "")
            if not culprit or (through is not None and culprit in through):
                raise PartitionError(_untraceable(model, culprit, error)) from error
            opaque.add(culprit)
            continue
        return Trace(root, graph, tracer.entered, tracer.returned)


def _untraceable(model: nn.Module, path: str, error: Exception) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/fx/" not in frame.filename and frame.filename != __file__
    ]
    where = f"{frames[-1].filename}:{frames[-1].lineno} `{frames[-1].line}`" if frames else "an unknown line"
    whose = f"module {path!r} of {type(model).__name__}" if path else f"{type(model).__name__}.forward"
    children = [name for name, _ in model.named_children()]
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{whose} cannot be traced: {where} depends on the values of its input ({reason}). "
        "If cuts= named modules inside it, name its siblings instead; otherwise pass the model as a list of modules that "
        "run one after the other: localize(model, method, modules=["
        + ", ".join(f"model.{name}" for name in children[:3])
        + ("" if len(children) <= 3 else ", ...")
        + "])."
    )


class _Values(fx.Interpreter):
    """Runs a trace on an example and notes the shape of each value and whether it carries a gradient."""

    def __init__(self, traced: Trace) -> None:
        super().__init__(traced.root, graph=traced.graph)
        self.traced = traced

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
        return node.op == "get_attr" and isinstance(_attribute(self.traced.root, str(node.target)), nn.Parameter)

    def _reads_differentiable(self, node: fx.Node) -> bool:
        return any(arg in self.traced.differentiable for arg in node.all_input_nodes)


def _attribute(root: nn.Module, target: str) -> Any:
    value: Any = root
    for name in target.split("."):
        value = getattr(value, name)
    return value


def note_values(traced: Trace, model: nn.Module, example: Any) -> None:
    """Fill in shapes and ``differentiable`` by running ``example`` in eval mode."""
    try:
        with _mode(model, False), torch.no_grad():
            _Values(traced).run(example)
    except Exception as error:
        shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PartitionError(
            f"{type(model).__name__} does not run on an example of shape {shape}: {reason}. Pass example= a small batch "
            "shaped as in training, for instance torch.randn(2, 3, 224, 224)."
        ) from error


def writes_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is known to overwrite its first argument."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place_name = (name.endswith("_") and not name.endswith("__")) or name in ("iadd", "imul", "isub", "itruediv")
    return bool(node.kwargs.get("inplace", False)) or in_place_name


def channels_hint(node: fx.Node, traced: Trace, limit: int = 12) -> Literal["first", "last"] | None:
    """Where the layers next to a value look for channels, by the first one with weights downstream, else upstream."""
    shape = node.meta.get("shape", ())
    if len(shape) != 4 or shape[1] == shape[3]:
        return None
    for step in (lambda n: n.users, lambda n: n.all_input_nodes):
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
