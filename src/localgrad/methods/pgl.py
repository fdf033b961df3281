"""Periodically guided local learning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from localgrad.batches import call_model
from localgrad.errors import MethodError, nearest
from localgrad.losses import Distilled
from localgrad.method import Method, Network
from localgrad.recompute.parts import BuffersKept
from localgrad.spans import Periodic
from localgrad.task import Batch

Guidance = Literal["backprop", "distill"]
Unit = Literal["step", "epoch"]


def pgl(
    base: Method,
    *,
    guidance: Guidance = "backprop",
    every: int = 10,
    duration: int = 1,
    start: int = 0,
    unit: Unit = "step",
    steps_per_epoch: int | None = None,
    weight: float = 0.5,
    temperature: float = 4.0,
    recompute: bool = True,
) -> Method:
    """Local training that the global objective guides from time to time.

    Guided are ``duration`` of every ``every`` steps, from step ``start`` on. What happens then:

    ``backprop``: the span is (0, K): the model's own loss trains all blocks, recomputed one by one in the backward pass
    so that memory stays low, and auxiliary heads rest.

    ``distill``: the model first answers without gradient; each auxiliary head minimises ``(1 - weight) * loss +
    weight * T ** 2 * KL(softmax(z_K / T) || softmax(z_k / T))``. Memory is the base's.

    On all other steps the base method applies.

    Args:
        base: a local method.
        guidance: see above.
        every: period; 1 guides always.
        duration: guided part of a period.
        start: when guidance may begin.
        unit: what ``every``, ``duration`` and ``start`` count.
        steps_per_epoch: needed to count epochs; ``localgrad train`` fills it in.
        weight: of the soft targets; 0 is the base method.
        temperature: T.
        recompute: run blocks again in the backward pass of guided steps, so that memory stays low; needs a model that
            torch.fx can take apart, see `localgrad.methods.checkpointing`.

    Raises:
        MethodError: unless ``1 <= duration <= every`` and ``start >= 0``; for an unknown option; for ``distill`` if no
            head answers with logits.

    Example:
        >>> import localgrad
        >>> method = localgrad.methods.pgl(localgrad.methods.dgl(localgrad.tasks.classification(10)), every=10)
        >>> method.spans(4, 0), len(method.spans(4, 1))
        ((Span(start=0, stop=4, weight=1.0),), 4)

    Source: PGL, ICML 2022 workshop, arXiv:2208.00821. A reconstruction: only its abstract is public ("reinstates the
    global objective repetitively", read as ``backprop``), and that of the first author's thesis ("periodically
    distilling the knowledge of last layer through the auxiliary networks", read as ``distill``). Period, duration,
    weight and temperature are ours.
    """
    for name, value, known in (("guidance", guidance, Guidance), ("unit", unit, Unit)):
        if value not in get_args(known):
            raise MethodError(nearest(value, get_args(known), name))
    steps = 1
    if unit == "epoch":
        if steps_per_epoch is None or steps_per_epoch < 1:
            raise MethodError(
                f"pgl(unit='epoch', steps_per_epoch={steps_per_epoch}): pass the batches of an epoch, "
                "steps_per_epoch=len(loader)"
            )
        steps = steps_per_epoch
    schedule = Periodic(base.spans, every * steps, duration * steps, start * steps)
    name = f"pgl({base.name})"
    if guidance == "backprop":
        return replace(base, name=name, spans=schedule, recompute=replace(base.recompute, blocks=recompute))
    base.require_logits("pgl")
    if not 0.0 <= weight <= 1.0 or not temperature > 0:
        raise MethodError(f"weight={weight}, temperature={temperature}; need a weight in [0, 1] and temperature > 0")
    if weight == 0:
        return replace(base, name=name)
    teacher = FinalLogits(schedule)
    terms = tuple(
        replace(term, loss=Distilled(term.loss, teacher, weight, temperature)) if term.scored else term
        for term in base.terms
    )
    return replace(base, name=name, terms=terms, contexts=(*base.contexts, teacher))


@dataclass(frozen=True)
class FinalLogits:
    """A `localgrad.method.Context`: what the model answers to the batch on guided steps, None on others."""

    schedule: Periodic

    def rests(self, step: int) -> bool:
        """Whether the model answers nothing at ``step``."""
        return not self.schedule.guided(step)

    def __call__(self, network: Network, batch: Batch) -> Any:
        if self.rests(batch.step):
            return None
        with BuffersKept(network.model):
            return call_model(network.model, batch.inputs)
