"""What other processes do for a network, as two protocols; `localgrad.distributed` has both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from localgrad.method import Term
from localgrad.spans import Span


class Replicas(Protocol):
    """The processes that train copies of a network on other samples; see `localgrad.distributed.Replicas`."""

    @property
    def rank(self) -> int:
        """Of this process among them."""

    @property
    def shard(self) -> bool:
        """Whether each has a share of every parameter only."""

    @property
    def samples(self) -> int:
        """Of all replicas in this step; see `count`."""

    def joined(self, rows: Tensor) -> Tensor:
        """The rows (B, ...) of all replicas that share a batch, in order."""

    def count(self, step: int, samples: int) -> None:
        """Compare the step, and tell how many samples this replica has in it."""

    def reducing(self, step: int, announce: Callable[[int], None]) -> AbstractContextManager[Callable[[int], None]]:
        """Around one step: what it gives is to be called with each block whose gradients are complete here."""

    def average_buffers(self) -> None:
        """Give all of them the mean of their buffers."""

    def check_equal(self) -> None:
        """Raise `TrainingError` unless parameters are the same everywhere."""


class Stage(Protocol):
    """The blocks that this process trains while others train the rest; see `localgrad.distributed.Stage`."""

    @property
    def blocks(self) -> range:
        """Those of this rank."""

    @property
    def runs(self) -> Sequence[range]:
        """The blocks of every rank."""

    @property
    def model(self) -> nn.Module:
        """What runs the blocks of this rank."""

    @property
    def modules(self) -> list[nn.Module]:
        """What is trained here: blocks, and the auxiliary networks behind them."""

    @property
    def follows(self) -> bool:
        """Whether twins follow units on other ranks."""

    def tensors(self, followed: bool = False) -> dict[str, Tensor]:
        """What is trained here, by name; with ``followed`` also what twins here follow."""

    def local_losses(
        self,
        inputs: Any,
        targets: Any,
        step: int,
        autocast: torch.dtype | None,
        on_output: Any,
        on_block_done: Callable[[int], None],
    ) -> Iterator[tuple[Span, Tensor]]:
        """See `localgrad.local_losses`."""

    def local_outputs(
        self, inputs: Any, autocast: torch.dtype | None, scored_only: bool
    ) -> Iterator[tuple[Span, Term | None, Any]]:
        """See `localgrad.local_outputs`."""

    def exchange(self) -> None:
        """See `localgrad.exchange`."""

    def settle(self) -> None:
        """Move every twin as far as it would have moved in one process by now."""

    def close(self) -> None:
        """End the links to other ranks, behind the last step."""

    def gather(self) -> None:
        """Give every rank the whole network."""
