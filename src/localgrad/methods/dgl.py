"""Decoupled greedy learning."""

from __future__ import annotations

from localgrad import heads
from localgrad.method import Method, Term
from localgrad.methods.composition import base
from localgrad.site import HeadBuilder
from localgrad.spans import Local
from localgrad.task import Task


@base
def dgl(task: Task, *, head: heads.Spec | HeadBuilder = "mlp") -> Method:
    """Every block minimises the task's loss of its own auxiliary head; gradients stay inside the block.

    ``L_k = task.loss(head_k(h_k))`` for ``k < K``, the model's own loss for the last block.

    Args:
        task: from `localgrad.tasks`.
        head: a head builder, or what `localgrad.heads.named` knows: ``mlp``, ``linear`` (greedy learning), ``2c2f``;
            tasks other than classification have heads of their own instead of those.

    Example:
        >>> import localgrad
        >>> localgrad.methods.dgl(localgrad.tasks.classification(10)).name
        'dgl'

    Source: Belilovsky et al., ICML 2020, arXiv:1901.08164.
    Differs: the synchronous form, all blocks in one step.
    """
    return Method("dgl", task, terms=(Term(heads.named(head, task), task.loss),), spans=Local())
