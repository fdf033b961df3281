"""Local learning with auxiliary networks that look like the rest of the model."""

from __future__ import annotations

from localgrad import heads
from localgrad.method import Method, Term
from localgrad.methods.composition import base
from localgrad.methods.kaiming import as_released
from localgrad.spans import Local
from localgrad.task import Task


@base
def auglocal(
    task: Task, *, depth: int = 2, tail: int | None = None, pyramid: float = 0.5, released: bool = False
) -> Method:
    """As DGL, but a head is a short copy of what follows: evenly spread later units, with weights of their own.

    The last ``tail`` blocks are trained together by the model's own loss. With a block for every unit, K units in all,
    the published form has ``K - depth - 1`` heads and a last block of ``depth + 1`` units.

    Args:
        task: from `localgrad.tasks`.
        depth: units of the first head; later ones are shallower, see `localgrad.heads.Remaining`.
        tail: blocks at the end that share one span; None for ``depth + 1``, the published choice on CIFAR with a block
            for every unit. On ImageNet it was 1.
        pyramid: share of ``depth`` that is gone at the last head; 0 on ImageNet.
        released: convolutions start as in the released code, see `localgrad.methods.kaiming`. A head that would differ
            from the released one is refused.

    Raises:
        MethodError: for a value out of range, or for a head that differs from the released one.

    Example:
        >>> import localgrad
        >>> method = localgrad.methods.auglocal(localgrad.tasks.classification(10), depth=1)
        >>> [str(span) for span in method.spans(4, 0)]
        ['(0, 1)', '(1, 2)', '(2, 4)']

    Source: Ma et al., AugLocal, ICLR 2024, arXiv:2402.17318, and its released CIFAR code.
    Differs: see `localgrad.heads.Remaining`; ``tail`` counts blocks where theirs counts units; layers start as PyTorch
    draws them unless ``released``.
    """
    tail = depth + 1 if tail is None else tail
    head = heads.Remaining(task.head(heads.Linear(task.num_outputs)), depth, pyramid, tail, released)
    method = Method("auglocal", task, terms=(Term(head, task.loss),), spans=Local(tail))
    return as_released(method) if released else method
