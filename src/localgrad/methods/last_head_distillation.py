"""Local learning that the model's own answer guides from time to time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from localgrad.batches import call_model
from localgrad.errors import MethodError
from localgrad.losses import Distilled
from localgrad.method import Context, Method, Network
from localgrad.methods.composition import plugin
from localgrad.spans import Periodic
from localgrad.state import StateKept
from localgrad.task import Batch


@plugin
def last_head_distillation(base: Method, *, every: int = 10, weight: float = 0.5, temperature: float = 4.0) -> Method:
    """Auxiliary heads learn from what the model's last layer answers, on one of every ``every`` steps.

    On such a step the model first answers without gradient, ``z_K``; each auxiliary head, which answers ``z_k``,
    minimises ``(1 - weight) * loss + weight * T ** 2 * KL(softmax(z_K / T) || softmax(z_k / T))``. Memory is the
    base's. On all other steps the base method applies.

    Args:
        base: a method some of whose heads answer with logits.
        every: period, in steps; 1 distils always.
        weight: of the soft targets; 0 is the base method.
        temperature: T.

    Raises:
        MethodError: if no head answers with logits, or for a value out of range.

    Example:
        >>> import localgrad
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(10))
        >>> localgrad.methods.last_head_distillation(method, every=5).name
        'last_head_distillation(dgl)'

    Source: the abstract of the thesis of PGL's first author ("periodically distilling the knowledge of last layer
    through the auxiliary networks"); see `localgrad.methods.pgl`. A reconstruction: all values are ours.
    """
    logits = base.require_logits("last_head_distillation")
    if not 0.0 <= weight <= 1.0 or not temperature > 0:
        raise MethodError(f"weight={weight}, temperature={temperature}; need a weight in [0, 1] and temperature > 0")
    name = f"last_head_distillation({base.name})"
    if weight == 0:
        return replace(base, name=name)
    teacher = FinalLogits(Periodic(base.spans, every))
    terms = tuple(
        replace(term, loss=Distilled(term.loss, logits, teacher, weight, temperature)) if term.scored else term
        for term in base.terms
    )
    return replace(base, name=name, terms=terms, contexts=(*base.contexts, teacher))


@dataclass(frozen=True)
class FinalLogits(Context):
    """What the model answers to the batch on guided steps, None on others."""

    schedule: Periodic

    def rests(self, step: int) -> bool:
        """Whether the model answers nothing at ``step``."""
        return not self.schedule.guided(step)

    def __call__(self, network: Network, batch: Batch) -> Any:
        if self.rests(batch.step):
            return None
        with StateKept(network.model):
            return call_model(network.model, batch.inputs)
