"""Gradients that arrive in another order than in one process, added up as there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from localgrad.distributed.rows import ways_through
from localgrad.network import LocalNetwork
from localgrad.passes import Pass
from localgrad.timetable import Row


class InOrder:
    """Takes the ways back of one rank, and adds gradients up in the order of one process.

    So it is for blocks through which ways go in another order than there: several micro-batches, and gradients from
    the next rank. What each way contributes is put aside until the block is done.

    Args:
        network: whose parameters get the gradients.
        rows: of the rank.
        whole: of one process.
    """

    def __init__(self, network: LocalNetwork, rows: Sequence[Row], whole: Sequence[Row]) -> None:
        self.order: dict[int, list[tuple[int, int]]] = {}
        for block in dict.fromkeys(row.block for row in rows if row.do == "back"):
            if ways_through(rows, block) != (order := ways_through(whole, block)):
                self.order[block] = order
        self.parameters = {k: [p for p in network.parameters_of(k) if p.requires_grad] for k in self.order}
        self._kept: dict[tuple[int, int, int], list[Tensor | None]] = {}

    def back(self, state: Pass, ways: Iterable[Row]) -> None:
        """Go back through blocks, as the rows say."""
        for row in ways:
            parameters = self.parameters.get(row.block, ())
            before = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
            state.back(row.start, row.block, row.free)
            if row.block in self.order:
                self._kept[row.block, row.part, row.start] = [parameter.grad for parameter in parameters]
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    @torch.no_grad()
    def add_up(self, block: int) -> None:
        """Leave the sum in the parameters of a block that no more gradients will reach."""
        for part, start in self.order.get(block, ()):
            for parameter, gradient in zip(self.parameters[block], self._kept.pop((block, part, start)), strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad += gradient
