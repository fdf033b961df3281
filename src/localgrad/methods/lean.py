"""Short copies of the rest of the model as heads, most of them on pooled features."""

from __future__ import annotations

from dataclasses import replace

from localgrad import bridges
from localgrad.method import Method
from localgrad.methods.auglocal import auglocal
from localgrad.methods.composition import base
from localgrad.task import Task


@base
def lean(task: Task, *, depth: int = 2, tail: int = 1, factor: int = 2, least: int = 4) -> Method:
    """AugLocal whose heads read pooled features, but for the first one: most of its accuracy for less of its cost.

    ``auglocal(task, depth=depth, tail=tail)`` behind `localgrad.bridges.Pool` but for the first boundary. Later
    blocks hardly become better than what the first block and its head can do, so that one keeps all positions; the
    others keep what there is at a quarter of the cost. ``docs/lean.md`` has the measurements. Cut into as few blocks as
    memory allows, by bytes: ``cuts.fits("2GiB")`` or ``cuts.by_bytes(8)``.

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
    return replace(looking_ahead, name="lean", bridge=bridges.Pool(factor, least, start=1))
