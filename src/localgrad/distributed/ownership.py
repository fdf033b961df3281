"""Which rank trains which tensor, and whose tensors another rank follows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from localgrad.network import LocalNetwork


@dataclass(frozen=True)
class Shipment:
    """What one rank sends another after each step: the tensors that twins there follow."""

    reader: int
    owner: int
    tensors: tuple[Tensor, ...]


def tensors_by_rank(network: LocalNetwork, rank_of: dict[int, int]) -> dict[Tensor, int]:
    """Every parameter and buffer of blocks and auxiliary networks, with the rank that trains it."""
    found: dict[Tensor, int] = {}
    for block, rank in rank_of.items():
        modules = [network.blocks[block], *(auxiliary for _, auxiliary in network.auxiliaries_at(block + 1))]
        for tensor in (t for module in modules for t in (*module.parameters(), *module.buffers())):
            found.setdefault(tensor, rank)
    return found


def shipments(network: LocalNetwork, rank_of: dict[int, int]) -> list[Shipment]:
    """What has to be sent after each step because twins on one rank follow units on another."""
    owner_of = {id(tensor): rank for tensor, rank in tensors_by_rank(network, rank_of).items()}
    found: dict[tuple[int, int], dict[int, Tensor]] = {}
    for boundary in range(1, len(network.blocks)):
        for twin in network.twins_at(boundary):
            followed = [*twin.source.parameters(), *(twin.source.buffers() if twin.buffers != "none" else ())]
            for tensor in followed:
                reader, owner = rank_of[boundary - 1], owner_of[id(tensor)]
                if reader != owner:
                    found.setdefault((reader, owner), {})[id(tensor)] = tensor
    return [Shipment(reader, owner, tuple(tensors.values())) for (reader, owner), tensors in found.items()]
