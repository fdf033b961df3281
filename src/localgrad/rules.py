"""What single methods need beyond spans, terms and bridges, as one protocol.

Implementations live in their method's file. A `Rule` is a value of `localgrad.method.Method`. For each micro-batch it
begins an `Observer`, which the engine tells what happens, in this order for each block: ``enter`` the features,
``during`` the block, ``measured``, then for each span that ends there ``answer`` and ``term_loss`` for each head, and
``total``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from localgrad.method import Auxiliary, Batch, Method, Term
    from localgrad.network import LocalNetwork
    from localgrad.partition import Cut, Partition


class Observer:
    """What a rule does in one micro-batch; by default nothing.

    Attributes:
        joins: keep block and head in one graph, so that the loss can be differentiated by the block's input, twice.
    """

    joins = False

    def enter(self, features: Tensor) -> Tensor:
        """The features, cut from their graph, as the next block is to read them."""
        return features

    def during(self, block: int) -> contextlib.AbstractContextManager[Any]:
        """Around the forward of a block."""
        return contextlib.nullcontext()

    def measured(self, block: int) -> Tensor | None:
        """A scalar found inside a block, which is added to every loss at its end."""
        return None

    def answer(self, boundary: int, term: Term, weight: float, output: Any, batch: Batch) -> Any:
        """What a head answered, as its loss and whoever watches are to read it."""
        return output

    def term_loss(self, boundary: int, term: Term | None, loss: Tensor, output: Any, batch: Batch) -> Tensor:
        """The loss of one head, or of the model's own output (``term`` None)."""
        return loss

    def total(self, boundary: int, total: Tensor, losses: Mapping[int, Tensor], features: Any, batch: Batch) -> Tensor:
        """The loss of a span; ``losses`` are those of its terms, by the identity of the term."""
        return total

    def reached(self) -> bool | None:
        """Whether the caller's backward pass came through the last loss; None if the boundary tells."""
        return None


class Rule:
    """What a method needs besides; subclasses are frozen dataclasses.

    Attributes:
        travels: whether it works where blocks run on several ranks; ``reason`` says why not.
        late: whether some heads get their gradients from the losses at the next boundary.
        joins: whether its observers may join block and head, and differentiate them twice.
    """

    travels: ClassVar[bool] = False
    late: ClassVar[bool] = False
    joins: ClassVar[bool] = False
    reason: ClassVar[str] = ""

    def check(self, method: Method, num_blocks: int) -> None:
        """Raise `MethodError` if the rule does not go with the method's spans."""

    def bound(self, partition: Partition, cuts: Sequence[Cut]) -> Rule:
        """The rule for one network; raises `MethodError` if the network lacks what it needs."""
        return self

    def observe(self, network: LocalNetwork, batch: Batch) -> Observer:
        """What follows one micro-batch."""
        raise NotImplementedError

    def built(self, term: Term, head: nn.Module) -> nn.Module:
        """A head as it is to stand in an auxiliary network."""
        return head

    def tried(self, network: LocalNetwork, example: Any) -> None:
        """Raise `MethodError` if a step on the example, in training mode, shows that the network does not allow it."""

    def late_parameters(self, auxiliary: Auxiliary) -> Iterable[nn.Parameter]:
        """Parameters of an auxiliary network that the losses at the next boundary train."""
        return ()
