"""Local learning with auxiliary networks that look like the rest of the model."""

from __future__ import annotations

from localgrad import heads
from localgrad.method import Method, Term
from localgrad.methods.composition import base
from localgrad.spans import Local
from localgrad.task import Task


@base
def auglocal(task: Task, *, depth: int = 2, tail: int | None = None, pyramid: float = 0.5) -> Method:
    """As DGL, but a head is a short copy of what follows: evenly spread later units, with weights of their own.

    The last ``tail`` blocks are trained together by the model's own loss.

    Args:
        task: from `localgrad.tasks`.
        depth: units of the first head; later ones are shallower, see `localgrad.heads.Remaining`.
        tail: blocks at the end that share one span; None for ``depth``, the published choice with a block per unit.
        pyramid: share of ``depth`` that is gone at the last head.

    Raises:
        MethodError: for a value out of range.

    Example:
        >>> import localgrad
        >>> method = localgrad.methods.auglocal(localgrad.tasks.classification(10), depth=2)
        >>> [str(span) for span in method.spans(4, 0)]
        ['(0, 1)', '(1, 2)', '(2, 4)']

    Source: Ma et al., AugLocal, ICLR 2024, arXiv:2402.17318, and its released CIFAR code.
    Differs: see `localgrad.heads.Remaining`; ``tail`` counts blocks where theirs counts units.
    """
    tail = depth if tail is None else tail
    head = heads.Remaining(task.head(heads.Linear(task.num_outputs)), depth, pyramid, tail)
    return Method("auglocal", task, terms=(Term(head, task.loss),), spans=Local(tail))
