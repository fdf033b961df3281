"""Local critic training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from localgrad import heads
from localgrad.batches import num_samples
from localgrad.method import Auxiliary, Method, Network, Observer, Rule, Term
from localgrad.methods.composition import base
from localgrad.spans import Local
from localgrad.task import Batch, Task, alone


@base
def local_critic(task: Task) -> Method:
    """Every block minimises what its critic says the loss will be; critics learn to say what the next one says.

    ``block k: task.loss(c_k(h_k))``, ``c_k: | task.loss(c_k(stop_gradient(h_k))) - stop_gradient(L_{k+1}) |``, where
    ``L_K`` is the model's own loss.

    Args:
        task: from `localgrad.tasks`.

    Example:
        >>> import localgrad
        >>> localgrad.methods.local_critic(localgrad.tasks.classification(10)).name
        'local_critic'

    Source: Lee et al., Local Critic Training, arXiv:2102.01963.
    Differs: critics share the blocks' optimizer (theirs: Adam, 1e-4); the distance is that of the batch's mean losses.
    """
    term = Term(task.head(heads.Critic(task.num_outputs)), task.loss)
    return Method("local_critic", task, terms=(term,), spans=Local(), rules=(_Following(),))


class Followed(NamedTuple):
    """What a critic answers: once for the loss of the block, once for its own."""

    output: Any
    own: Any


class Critic(nn.Module):
    """A head whose parameters are out of reach of the block's loss, and whose own loss does not reach the block.

    One that does not train, as in copies for inference, has no loss of its own: it answers as its head does.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Any:
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in self.head.parameters()):
            return self.head(features)
        frozen = {name: p.detach() for name, p in self.head.named_parameters()}
        return Followed(torch.func.functional_call(self.head, frozen, (features,)), self.head(features.detach()))


@dataclass(frozen=True)
class _Following(Rule):
    reason: ClassVar[str] = "lets heads follow the loss at the next boundary"
    late: ClassVar[bool] = True

    def built(self, term: Term, head: nn.Module) -> nn.Module:
        return Critic(head) if term.scored else head

    def observe(self, network: Network, batch: Batch) -> _Critics:
        return _Critics()

    def late_parameters(self, auxiliary: Auxiliary) -> Iterable[nn.Parameter]:
        return [p for head in auxiliary.heads if isinstance(head, Critic) for p in head.parameters()]


class _Critics(Observer):
    """Heads whose loss waits for that of their term at the next boundary, or for the model's own."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, Term, float, Tensor]] = []

    def answer(self, boundary: int, term: Term, weight: float, output: Any, batch: Batch) -> Any:
        if not isinstance(output, Followed):
            return output
        self.waiting.append((boundary, term, weight, term.loss(output.own, batch)))
        return output.output

    def total(self, boundary: int, total: Tensor, losses: Mapping[int, Tensor], features: Any, batch: Batch) -> Tensor:
        due = [entry for entry in self.waiting if entry[0] < boundary]
        self.waiting = [entry for entry in self.waiting if entry[0] >= boundary]
        whole = total
        for _, term, weight, loss in due:
            apart = loss - losses.get(id(term), whole).detach()
            if batch.joined is not alone:  # the distance of two means over all samples, not a mean of distances
                apart = batch.joined(apart.expand(num_samples(batch.inputs) or 1)).mean()
            total = total + weight * apart.abs()
        return total
