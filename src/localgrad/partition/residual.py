"""Residual branches: what a unit adds to the features it passes on."""

from __future__ import annotations

from localgrad.errors import MethodError
from localgrad.partition.moments import Partition
from localgrad.partition.record import Value


def residual_branches(partition: Partition) -> list[tuple[int, str]]:
    """When the addition runs, and path of the module that returns what is added, for each residual branch.

    An addition of two values with gradient is residual if both go back to one value, and one of them over fewer layers
    with weight matrices than the other; the longer way is the branch.

    Raises:
        MethodError: a branch is not what a module returns, so it cannot be measured.
    """
    graph = partition.graph
    owners: dict[Value, str] = {}
    for call in partition.calls:  # the innermost module that returns a value ends first
        for value, _ in call.returned if not call.structured else ():
            known = owners.get(value)
            owners[value] = call.name if known is None or call.name.startswith(known + ".") else known
    layers = partition.layer_bits()
    found = []
    for index, kind in enumerate(graph.kinds):
        operands = graph.inputs[index]
        if not kind.startswith("AddBackward0") or len(operands) != 2:
            continue
        branch = _branch(operands[0], operands[1], layers, partition)
        if branch is None:
            continue
        if graph.kinds[branch[0]].startswith("Upsample"):
            continue  # a pyramid adds a coarser level, which is no residual
        if branch not in owners:
            raise MethodError(
                f"a residual branch of {type(partition.model).__name__} (made by {graph.kinds[branch[0]]}) is computed "
                "by a function, not returned by a module, so it cannot be measured; end it in a module (nn.Identity() "
                "will do)"
            )
        found.append((graph.times[index], owners[branch]))
    for path in {path for _, path in found}:
        calls = sum(call.name == path for call in partition.calls)
        if calls > sum(path == other for _, other in found):
            raise MethodError(
                f"module {path!r} of {type(partition.model).__name__} returns a residual branch and is called "
                "elsewhere too, so the branch cannot be told apart; use a module of its own there"
            )
    return found


def _branch(first: Value, second: Value, layers: int, partition: Partition) -> Value | None:
    """The one of two summands that is a residual branch of the other, None if neither is."""
    above = partition.graph.ancestors
    common = above[first[0]] & above[second[0]]
    shapes = partition.shapes
    if not common or shapes.get(first, shapes.get(second)) != shapes.get(second, shapes.get(first)):
        return None
    a, b = (((above[value[0]] & ~common) & layers).bit_count() for value in (first, second))
    return None if a == b else first if a > b else second
