"""What the forward of one rank hands to the next: values by name, and which of them carry a gradient back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localgrad.batches import tensors_in
from localgrad.boundary import BlockGraph
from localgrad.distributed.compression import Wire
from localgrad.distributed.trees import decoded, encoded
from localgrad.errors import MethodError
from localgrad.localization import separate_blocks
from localgrad.network import LocalNetwork
from localgrad.partition import INPUTS, OUTPUT, Block, RecomputedBlock, SeparateBlocks
from localgrad.partition.units import Called
from localgrad.passes import Held, Pass
from localgrad.suspension.points import Point

Blocks = Sequence[Block | RecomputedBlock]
Place = tuple[int, int]  # of a tensor: the block that made it, and its place among the gradients there


class _Exit(nn.Module):
    """Stands behind the last block of a rank, where its forward is left suspended."""

    def forward(self, features: Tensor, values: dict[str, Any]) -> None:
        pass


class RankBlocks(SeparateBlocks):
    """The blocks of one rank as one forward.

    Where blocks of others follow, it does not return: it is suspended behind its last block, at a door that is given
    the features and all values that others read.
    """

    def __init__(self, blocks: Blocks, run: range) -> None:
        super().__init__([blocks[k] for k in run], blocks[run.stop :])
        self.exit = _Exit()

    @property
    def points(self) -> tuple[Point, ...]:
        """See `SeparateBlocks`."""
        return (*super().points, *([Point("exit")] if self.elsewhere else ()))

    def forward(self, values: dict[str, Any]) -> Any:
        """Run the blocks on values by name."""
        values = self.run(values)
        if not self.elsewhere:
            return values[OUTPUT]
        last = self.blocks[-1]
        assert isinstance(last, (Block, RecomputedBlock))
        return self.exit(values[last.outputs[0]], values)

    def read_elsewhere(self, name: str) -> bool:
        """Whether a rank after this one reads a value."""
        return any(name in block.inputs for block in self.elsewhere)


def blocks_of(network: LocalNetwork) -> Blocks:
    """All blocks of a network, each to be called by itself.

    Raises:
        PartitionError: the model does not allow it.
        MethodError: copies of later units are called with tensors that only the model's own forward has.
    """
    for module in network.auxiliary.modules():
        if isinstance(module, Called) and (keys := [key for key, value in module.others.items() if tensors_in(value)]):
            raise MethodError(
                f"{network.method.name} copies a later unit that is called with the tensor {keys[0]!r} besides the "
                "features, which does not travel between ranks; use a method without bridges, or train in one process"
            )
    return separate_blocks(network)


def handed_on(
    one: Pass, tensors: list[Tensor], wire: Wire, waited: Wire = "same"
) -> tuple[dict[str, Any], list[Place]]:
    """What is said about the values behind the last block of a rank, whose tensors are added to ``tensors``.

    Args:
        one: suspended there.
        tensors: of a message.
        wire: how they are sent.
        waited: as what features wait for other micro-batches in one process; they are sent so, and not what blocks make
            without a gradient.

    Returns:
        what is said; and the places of the tensors that carry a gradient back, in order.
    """
    _, values = one.forward.arguments.args
    held = {id(tensor): entry for entry in one.held if (tensor := entry.ref()) is not None}
    crossing = {span.start for span in one.spans if span.stop > one.blocks.stop} if torch.is_grad_enabled() else set()
    places: list[Place] = []
    carried: list[tuple[int, int]] = []
    coded = []
    for name, value in values.items():
        if name == INPUTS:
            continue
        first = len(tensors)
        waits = waited if any(id(leaf) in held for leaf in tree_leaves(value)) else "same"
        coded.append((name, encoded(value, tensors, name, wire if wire != "same" else waits)))
        for index, leaf in enumerate(tensors[first:], start=first):
            entry = held.get(id(leaf))
            if entry is not None and any(start <= entry.maker for start in crossing):
                carried.append((index, entry.maker))
                places.append((entry.maker, entry.slot))
    return {"values": coded, "carried": carried}, places


def received(said: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The values that were `handed_on`, by name."""
    return {name: decoded(code, tensors) for name, code in said["values"]}


def entered(one: Pass, said: Mapping[str, Any], tensors: Sequence[Tensor]) -> list[Place]:
    """Let ``one``, which begins with values from another rank, know them as what blocks before have made.

    Returns:
        the places of those that carry a gradient back, in order.
    """
    places: list[Place] = []
    for index, maker in said["carried"]:
        graph = one.graphs.setdefault(maker, BlockGraph([], maker))
        places.append((maker, len(graph.gradients)))
        graph.gradients.append(None)
        one.held.append(Held(("received", str(index)), tensors[index], *places[-1]))
    return places
