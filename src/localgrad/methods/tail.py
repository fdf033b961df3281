"""The last blocks as one."""

from __future__ import annotations

from dataclasses import replace

from localgrad.method import Method
from localgrad.methods.composition import plugin


@plugin
def tail(base: Method, *, blocks: int = 2) -> Method:
    """The last ``blocks`` blocks are trained together by the model's own loss; the others as in ``base``.

    In a network whose features shrink, late blocks keep few activations, so that several of them need no more memory
    than an early one alone. Their auxiliary networks, which would see features of full width, are not built.

    Args:
        base: a method whose spans are single blocks.
        blocks: how many share the model's own loss; 1 is the base method. K of them or more are end-to-end training.

    Raises:
        MethodError: if the base is not local, or for fewer than 1 block.

    Example:
        >>> import localgrad
        >>> method = localgrad.methods.tail(localgrad.methods.dgl(localgrad.tasks.classification(10)), blocks=2)
        >>> [str(span) for span in method.spans(4, 0)]
        ['(0, 1)', '(1, 2)', '(2, 4)']

    Source: AugLocal (arXiv:2402.17318) trains the end of the network so; for any base it is ours.
    """
    return replace(base, name=f"tail({base.name})", spans=replace(base.require_local("tail"), tail=blocks))
