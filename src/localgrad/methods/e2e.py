"""Ordinary back-propagation."""

from __future__ import annotations

from localgrad.method import Method
from localgrad.methods.composition import base
from localgrad.spans import EndToEnd
from localgrad.task import Task


@base
def e2e(task: Task) -> Method:
    """End-to-end training: one span over all blocks, no auxiliary network.

    Gradients equal ``task.loss(model(inputs)).backward()`` bit for bit.

    Args:
        task: from `localgrad.tasks`.

    Example:
        >>> import localgrad
        >>> localgrad.methods.e2e(localgrad.tasks.classification(10)).name
        'e2e'
    """
    return Method("e2e", task, spans=EndToEnd())
