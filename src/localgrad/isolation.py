"""Whether a loss trains what its span says, read off the autograd graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from localgrad.boundary import BlockGraph
from localgrad.errors import PartitionError
from localgrad.network import LocalNetwork
from localgrad.spans import Span


def check_isolation(network: LocalNetwork, span: Span, loss: Tensor, graph: BlockGraph) -> None:
    """Walk the graphs of a loss and of the block at its end.

    The graph of every other block of the span is walked with that block's own loss, or is part of the same walk.

    Raises:
        PartitionError: they reach a parameter of the model that no block of the span uses, or one that is new.
    """
    home = network.home
    by_loss = parameters_reached([loss])
    reached = by_loss | parameters_reached([graph.root])
    for name, parameter in network.running.named_parameters():
        if id(parameter) not in reached:
            continue
        if name not in home:
            raise PartitionError(
                f"the loss of span {span} trains {name!r}, which the model did not have, or did not use, when it was "
                "cut: call localgrad.localize again after changing a model"
            )
        if not home[name] or any(graph.first <= block < span.stop for block in home[name]):
            continue  # where the example did not use it (layer drop) nobody can say
        if id(parameter) in by_loss:
            raise PartitionError(
                f"the loss of span {span} reads {name!r} of block {home[name][0]}, which lies outside: a loss or a "
                "head may read the model's parameters of its own span only; detach them there"
            )
        raise PartitionError(
            f"the loss of span {span} reaches {name!r} of block {home[name][0]}, which lies outside: the model "
            "passes a tensor on that is neither taken nor returned by a module nor a local variable of a "
            "forward (an attribute or a cache, most likely). Return it from a module, switch the cache off "
            f"(use_cache=False), or cut elsewhere than at {network.begins_at(graph.first)}. If it was unfrozen after "
            "localize, call localize again"
        )


def parameters_reached(tensors: Iterable[Tensor | None]) -> set[int]:
    """Identities of the leaf tensors in the graphs of ``tensors``."""
    found: set[int] = set()
    seen: set[Any] = set()
    stack: list[Any] = [tensor.grad_fn for tensor in tensors if tensor is not None and tensor.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [following for following, _ in node.next_functions if following is not None]
    return found
