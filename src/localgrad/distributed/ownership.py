"""Which rank trains which tensor, and whose tensors another rank follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from localgrad.network import LocalNetwork

Owners = dict[Tensor, int]


@dataclass(frozen=True)
class Shipment:
    """What one rank sends another after each step: the tensors that twins there follow."""

    reader: int
    owner: int
    tensors: tuple[Tensor, ...]


def tensors_by_rank(network: LocalNetwork, blocks: Sequence[nn.Module], rank_of: Mapping[int, int]) -> Owners:
    """Every parameter and buffer of blocks and auxiliary networks, with the rank that trains it.

    Args:
        network: whose auxiliary networks are trained with the block before them.
        blocks: all of them, each with what it reads.
        rank_of: the rank of each block.
    """
    found: Owners = {}
    for block, rank in rank_of.items():
        modules = [blocks[block], *(auxiliary for _, auxiliary in network.auxiliaries_at(block + 1))]
        for tensor in (t for module in modules for t in (*module.parameters(), *module.buffers())):
            found.setdefault(tensor, rank)
    return found


def shipments(network: LocalNetwork, owners: Owners, rank_of: Mapping[int, int]) -> list[Shipment]:
    """What has to be sent after each step because twins on one rank follow units on another."""
    owner_of = {id(tensor): rank for tensor, rank in owners.items()}
    found: dict[tuple[int, int], dict[int, Tensor]] = {}
    for boundary in range(1, network.num_blocks):
        for twin in network.twins_at(boundary):
            followed = [*twin.source.parameters(), *(twin.source.buffers() if twin.buffers != "none" else ())]
            for tensor in followed:
                reader, owner = rank_of[boundary - 1], owner_of[id(tensor)]
                if reader != owner:
                    found.setdefault((reader, owner), {})[id(tensor)] = tensor
    return [Shipment(reader, owner, tuple(tensors.values())) for (reader, owner), tensors in found.items()]
