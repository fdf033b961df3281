"""Gradients that arrive in another order than in one process, added up as there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from localgrad.network import LocalNetwork


class InOrder:
    """Gradients of ``blocks``, whose contributions arrive in another order than in one process, added up as there."""

    def __init__(self, network: LocalNetwork, blocks: Sequence[int]) -> None:
        self.parameters = {k: [p for p in network.blocks[k].parameters() if p.requires_grad] for k in blocks}
        self._kept: dict[int, list[tuple[tuple[int, ...], list[Tensor | None]]]] = {k: [] for k in blocks}

    @contextlib.contextmanager
    def kept(self, place: tuple[int, ...]) -> Iterator[None]:
        """What backward passes inside it contribute is put aside; ``place`` says when it would come in one process."""
        before = [(p, p.grad) for block in self._kept for p in self.parameters[block]]
        for parameter, _ in before:
            parameter.grad = None
        yield
        for block, contributions in self._kept.items():
            contributions.append((place, [p.grad for p in self.parameters[block]]))
        for parameter, gradient in before:
            parameter.grad = gradient

    @torch.no_grad()
    def add_up(self, block: int) -> None:
        """Leave the sum in the parameters of a block that no more gradients will reach."""
        for _, gradients in sorted(self._kept.pop(block, []), key=lambda entry: entry[0]):
            for parameter, gradient in zip(self.parameters[block], gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad += gradient


def kept(gradients: InOrder | None, place: tuple[int, ...]) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if gradients is None else gradients.kept(place)
