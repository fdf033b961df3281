"""Twins of units that other ranks train: weights travel after each step, and twins move when somebody looks."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from localgrad.distributed.custody import Owners
from localgrad.distributed.link import WEIGHTS, Inlet, Outlet
from localgrad.distributed.timeline import Timeline
from localgrad.network import LocalNetwork


def shipments(network: LocalNetwork, owners: Owners, rank_of: Mapping[int, int]) -> dict[tuple[int, int], list[Tensor]]:
    """By (reader, owner): the tensors sent after each step because twins on one rank follow units on another."""
    owner_of = {id(tensor): rank for tensor, rank in owners.items()}
    found: dict[tuple[int, int], dict[int, Tensor]] = {}
    for boundary in range(1, network.num_blocks):
        reader = rank_of[boundary - 1]
        for twin in network.twins_at(boundary):
            for tensor in (*twin.source.parameters(), *(twin.source.buffers() if twin.buffers != "none" else ())):
                if (owner := owner_of[id(tensor)]) != reader:
                    found.setdefault((reader, owner), {})[id(tensor)] = tensor
    return {ranks: list(tensors.values()) for ranks, tensors in found.items()}


class RemoteTwins:
    """The twins on the boundaries of one rank, and the units there that twins on other ranks follow.

    Args:
        network: of which some blocks are trained here.
        group: the ranks along the blocks, in order.
        boundaries: those whose auxiliary networks are trained here.
        owners: the rank that trains each tensor; ``rank_of`` the rank of each block.
        depth: steps a rank may be ahead.
        timeline: told when weights arrive.

    Attributes:
        any: whether any twin along the blocks follows a unit of another rank.
        followed: by rank, the tensors here that hold the weights of its units.
        inlets, outlets: the links of weights, by the rank at the other end.
    """

    def __init__(
        self,
        network: LocalNetwork,
        group: dist.ProcessGroup,
        boundaries: range,
        owners: Owners,
        rank_of: Mapping[int, int],
        depth: int,
        timeline: Timeline,
    ) -> None:
        self.network, self.boundaries, self.timeline, self._rank = network, boundaries, timeline, group.rank()
        owner_of = {id(tensor): rank for tensor, rank in owners.items()}
        self._sources = {
            twin: next((owner_of[id(p)] for p in twin.source.parameters()), self._rank)
            for boundary in boundaries
            for twin in network.twins_at(boundary)
        }
        sent = shipments(network, owners, rank_of)
        self.any = bool(sent)
        self._shipped = {reader: tensors for (reader, owner), tensors in sent.items() if owner == self._rank}
        self.followed = {owner: tensors for (reader, owner), tensors in sent.items() if reader == self._rank}
        self.outlets = {reader: Outlet(group, reader, WEIGHTS, depth) for reader in self._shipped}
        self.inlets = {owner: Inlet(group, owner, WEIGHTS, depth, network.device) for owner in self.followed}
        self._coming: dict[int, deque[int]] = {owner: deque() for owner in self.followed}
        self._due: dict[int, int] = {}

    def exchange(self, step: int) -> None:
        """Send the weights after ``step``, and move the twins whose units are here."""
        for reader, outlet in self.outlets.items():
            outlet.send(step, 0, None, self._shipped[reader], self.timeline.arrival(WEIGHTS))
        for boundary in list(self._due):
            self.move_due(boundary)
        for coming in self._coming.values():
            coming.append(step)
        for boundary in self.boundaries:
            for twin in self.network.twins_at(boundary):
                if twin.exchange == "after" and self._sources[twin] == self._rank:
                    twin.update()
                elif twin.exchange == "after":
                    self._due[boundary] = step

    @torch.no_grad()
    def _load(self, owner: int, upto: int) -> None:
        """Take the weights another rank had after the steps before and at ``upto``."""
        coming = self._coming.get(owner, deque())
        while coming and coming[0] <= upto:
            message = self.inlets[owner].take(coming.popleft())
            self.timeline.received(message.stamp)
            for tensor, new in zip(self.followed[owner], message.tensors, strict=True):
                tensor.copy_(new)

    def move_due(self, boundary: int) -> None:
        """Move the twins that should have moved after the step before, now that somebody looks through them."""
        step = self._due.pop(boundary, None)
        if step is None:
            return
        for twin in self.network.twins_at(boundary):
            if twin.exchange == "after" and self._sources[twin] != self._rank:
                self._load(self._sources[twin], step)
                twin.update()

    def move_early(self, boundary: int, step: int) -> None:
        """Move those that move before the optimizer step, towards the weights after the step before."""
        if boundary in self.boundaries:
            for twin in self.network.twins_at(boundary):
                if twin.exchange == "before" and self._sources[twin] != self._rank:
                    self._load(self._sources[twin], step - 1)
            self.network.exchange_before_step(boundary)

    def settle(self) -> None:
        """Move every twin as far as it would have moved in one process by now: before saving, for instance."""
        for boundary in list(self._due):
            self.move_due(boundary)
        for owner, coming in self._coming.items():
            if coming:
                self._load(owner, coming[-1])
