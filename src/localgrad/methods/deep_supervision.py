"""Deep supervision: auxiliary losses without cutting any gradient."""

from __future__ import annotations

from localgrad import heads
from localgrad.errors import MethodError
from localgrad.method import Method, Term
from localgrad.methods.composition import base
from localgrad.spans import FromInput
from localgrad.task import Task


@base
def deep_supervision(task: Task, *, weight: float = 0.3) -> Method:
    """End-to-end training with a classifier on every boundary: ``L = L_K + weight * sum_k L_k``.

    The upper bound on what auxiliary losses alone do; memory is that of end-to-end training.

    Args:
        task: from `localgrad.tasks`.
        weight: of each auxiliary loss.

    Raises:
        MethodError: for a weight that is not positive.

    Example:
        >>> import localgrad
        >>> localgrad.methods.deep_supervision(localgrad.tasks.classification(10)).name
        'deep_supervision'

    Source: Lee et al., Deeply-Supervised Nets, AISTATS 2015, arXiv:1409.5185.
    Differs: cross-entropy on pooled features instead of squared hinge loss; constant weight.
    """
    if not weight > 0:
        raise MethodError(f"weight={weight}; deep supervision needs a positive weight, or use e2e(task)")
    head = task.head(heads.Linear(task.num_outputs))
    return Method("deep_supervision", task, terms=(Term(head, task.loss),), spans=FromInput(weight))
