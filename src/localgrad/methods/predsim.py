"""Prediction and similarity matching."""

from __future__ import annotations

from localgrad import heads, losses
from localgrad.errors import MethodError
from localgrad.method import Method, Term
from localgrad.methods.composition import base
from localgrad.methods.kaiming import as_released
from localgrad.spans import Local
from localgrad.task import Task


@base
def predsim(task: Task, *, beta: float = 0.99, size: int = 1024, released: bool = False) -> Method:
    """Every block matches the similarity of its features to that of the labels, and predicts the label a little.

    ``L_k = (1 - beta) * task.loss(linear_k(pool(h_k))) + beta * similarity(projection_k(h_k))`` for ``k < K``, the
    model's own loss for the last block. Similarity matching wants several images of a class in each batch.

    Args:
        task: from `localgrad.tasks`; one whose samples have a class each, or several labels.
        beta: weight of similarity matching, in [0, 1].
        size: values left by the pooling before the linear read-out, at most.
        released: as AugLocal's release, the only one with residual networks: the projection starts as
            `localgrad.methods.kaiming` draws it, the read-out as PyTorch does.

    Raises:
        MethodError: for a beta outside [0, 1].

    Example:
        >>> import localgrad
        >>> localgrad.methods.predsim(localgrad.tasks.classification(10)).name
        'predsim'

    Source: Nokland & Eidnes, ICML 2019, arXiv:1901.06656, and its released code.
    Differs: blocks may hold several layers, and all step together; the read-out starts at 0 as there, and not as in
    AugLocal's release, unless ``released``.
    """
    if not 0.0 <= beta <= 1.0:
        raise MethodError(f"beta={beta}; predsim needs a beta between 0 and 1")
    method = Method(
        "predsim",
        task,
        terms=(
            Term(task.head(heads.PooledLinear(task.num_outputs, size, not released)), task.loss, 1.0 - beta),
            Term(heads.Projection(), losses.Similarity(task), beta, scored=False),
        ),
        spans=Local(),
    )
    return as_released(method) if released else method
