"""Residual branches: what a unit adds to the features it passes on."""

from __future__ import annotations

import operator

import torch
from torch import fx

from localgrad.errors import MethodError
from localgrad.partition.cuts import Partition, is_unit
from localgrad.partition.trace import ROOT

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def residual_branches(partition: Partition) -> list[tuple[int, str]]:
    """Position of the addition, and path of the module that returns what is added, for each residual branch.

    An addition of two values with gradient is residual if both go back to one value, and one of them over fewer layers
    with weight matrices than the other; the longer way is the branch.

    Raises:
        MethodError: a branch is not what a module returns, so it cannot be measured.
    """
    traced = partition.traced
    position = {node: index for index, node in enumerate(traced.nodes)}
    owners = {node: path for path, node in traced.returned.items()}
    owners |= {n: str(n.target).removeprefix(f"{ROOT}.") for n in traced.nodes if n.op == "call_module"}
    above: dict[fx.Node, frozenset[fx.Node]] = {}
    found = []
    for node in traced.nodes:
        above[node] = frozenset().union(*(above[arg] | {arg} for arg in node.all_input_nodes))
        operands = [arg for arg in node.all_input_nodes if arg in traced.differentiable]
        if node.target not in _ADDITIONS or len(operands) != 2:
            continue
        branch = _branch(operands[0], operands[1], above, partition)
        if branch is None:
            continue
        if branch not in owners:
            raise MethodError(
                f"the residual branch {branch.name!r} of {type(partition.model).__name__} is computed by a function, "
                "not returned by a module, so it cannot be measured; end it in a module (nn.Identity() will do)"
            )
        found.append((position[node], owners[branch]))
    for path in {path for _, path in found}:
        calls = sum(n.op == "call_module" and owners[n] == path for n in traced.nodes)
        if calls > sum(path == other for _, other in found):
            raise MethodError(
                f"module {path!r} of {type(partition.model).__name__} returns a residual branch and is called "
                "elsewhere too, so the branch cannot be told apart; use a module of its own there"
            )
    return found


def _branch(
    first: fx.Node, second: fx.Node, above: dict[fx.Node, frozenset[fx.Node]], partition: Partition
) -> fx.Node | None:
    """The one of two summands that is a residual branch of the other, None if neither is."""
    common = ((above[first] | {first}) & (above[second] | {second})) & partition.traced.differentiable
    if not common or first.meta.get("shape") != second.meta.get("shape"):
        return None

    def weighted(end: fx.Node) -> int:
        way = (above[end] | {end}) - common
        return sum(n.op == "call_module" and is_unit(partition.traced.root.get_submodule(str(n.target))) for n in way)

    a, b = weighted(first), weighted(second)
    return None if a == b else first if a > b else second
