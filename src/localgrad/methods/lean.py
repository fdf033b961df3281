"""Local learning at about the cost of its blocks: short copies of the rest of the model, on pooled features."""

from __future__ import annotations

from dataclasses import replace

from localgrad.method import Method, Task
from localgrad.methods.auglocal import auglocal
from localgrad.methods.pooled import pooled


def lean(task: Task, *, depth: int = 3, tail: int = 1, factor: int = 2, least: int = 8) -> Method:
    """Heads like the rest of the model, on pooled features: most of AugLocal's accuracy, without its memory and time.

    ``auglocal(task, depth=depth, tail=tail)`` behind ``pooled(factor=factor, least=least)``. Its settings are those
    that kept most accuracy for their cost; see ``docs/lean.md`` for what was compared. Cut into as few blocks as the
    memory allows, by bytes: ``localize(..., memory="2GiB")`` or ``balance="bytes"``.

    Args:
        task: from `localgrad.tasks`.
        depth: units of the first head; later ones are shallower.
        tail: blocks at the end that share one span. In a network whose features shrink, several of one unit each take
            no more memory than the first block.
        factor: sides of the pooling, less where fewer than ``least`` positions would remain.
        least: positions per side that pooling leaves at least.

    Raises:
        MethodError: for a value out of range.

    Example:
        >>> import localgrad
        >>> localgrad.methods.lean(localgrad.tasks.classification(10)).name
        'lean'

    Source: ours; the heads are AugLocal's (arXiv:2402.17318).
    """
    looking_ahead = auglocal(task, depth=depth, tail=tail)
    return replace(pooled(looking_ahead, factor=factor, least=least), name="lean")
