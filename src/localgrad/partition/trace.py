"""A model's forward as a graph, by torch.fx, for blocks that can be called one by one.

Only the ancestors of the modules that blocks begin with are traced through. Everything else stays the model's own
module, with its mode, its dropout and any batch size.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from localgrad.errors import PartitionError
from localgrad.suspension.untouched import untouched

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


def _library_functions() -> tuple[Callable[..., Any], ...]:
    """Functions that timm declares untraceable; one that was never imported has none in the model."""
    if "timm.models" not in sys.modules:
        return ()
    from timm.models import _features_fx

    return tuple(_features_fx.get_notrace_functions())


class _Tracer(fx.Tracer):
    """Traces through every module but those ``is_leaf`` names, and remembers where each module was entered and left."""

    def __init__(self, is_leaf: Callable[[nn.Module, str], bool], autowrap: tuple[Callable[..., Any], ...]) -> None:
        super().__init__(autowrap_functions=autowrap)
        self._is_leaf = is_leaf
        self.entered: dict[str, int] = {}
        self.taken: dict[str, list[Any]] = {}
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name != ROOT and self._is_leaf(m, module_qualified_name.removeprefix(ROOT + "."))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        path = name.removeprefix(ROOT).removeprefix(".")
        caller = self.inside[-1] if self.inside else ""
        if not caller or path.startswith(caller + "."):  # else it is shared, and called where its path does not lead
            self.entered.setdefault(path, len(self.graph.nodes))
            self.taken.setdefault(path, tree_leaves((args, kwargs)))
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        self.inside.append(path)
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result


@dataclass
class Trace:
    """A traced model.

    Args:
        graph: nodes in the order they run.
        entered: module path -> number of nodes before its first call began.
        taken: module path -> what that call took, each argument by itself.
    """

    root: nn.Module
    graph: fx.Graph
    entered: dict[str, int]
    taken: dict[str, list[Any]]

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)


def trace(
    model: nn.Module,
    num_inputs: int | None,
    *,
    training: bool,
    through: Collection[str],
) -> Trace:
    """Trace ``model`` through the modules ``through``; every other one is kept whole.

    Raises:
        PartitionError: one of them cannot be traced; the message says where.
    """
    # What is computed from buffers alone is recorded; frozen into the graph only where a forward branches on buffers.
    record_buffers = True
    while True:
        root = _Root(model, num_inputs)
        tracer = _Tracer(lambda module, path: path not in through, _library_functions())
        tracer.proxy_buffer_attributes = record_buffers
        try:
            with untouched(model, training), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                before = torch.get_rng_state()
                graph = tracer.trace(root)
                drawn = not torch.equal(before, torch.get_rng_state())
        except Exception as error:  # a forward may fail in any way when it is given proxies
            culprit = next((path for path in reversed(tracer.inside) if path), "")
            if record_buffers:
                record_buffers = False
                continue
            raise PartitionError(_untraceable(model, culprit, error)) from error
        if drawn:
            raise PartitionError(
                f"{type(model).__name__} draws random numbers of a fixed size (torch.rand(...), say) in a forward that "
                "has to be traced, so every step would see the same draw. Move the draw into a module of its own, or "
                "pass a list of modules that run one after the other."
            )
        return Trace(root, graph, tracer.entered, tracer.taken)


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
