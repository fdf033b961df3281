"""Heads as a recipe names them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from localgrad.errors import MethodError, nearest
from localgrad.heads.conv import Conv
from localgrad.heads.imagenet import Classifier
from localgrad.heads.linear import Linear
from localgrad.heads.mlp import MLP
from localgrad.site import HeadBuilder
from localgrad.task import Task

# A name, or a name with options: "linear", "2c2f", {"mlp": {"hidden": 128}}.
Spec = str | dict[str, dict[str, Any]]

_KINDS: dict[str, Any] = {"linear": Linear, "mlp": MLP, "imagenet": Classifier}


def named(spec: Spec | HeadBuilder, task: Task) -> HeadBuilder:
    """The head that ``task`` has where a classifier would have the one that ``spec`` names.

    Args:
        spec: ``linear``, ``mlp``, ``imagenet``, ``<n>c<m>f`` (see `localgrad.heads.Conv`), or a mapping of ``mlp`` to
            its options; a builder is returned as it is.
        task: says what its heads are and how wide their outputs.

    Raises:
        MethodError: an unknown head or option.
    """
    return spec if callable(spec) else task.head(classifier(spec, task.num_outputs))


def classifier(spec: Spec | HeadBuilder, outputs: int) -> HeadBuilder:
    """The head that ``spec`` names, ``outputs`` wide, as it is; see `named`."""
    if callable(spec):
        return spec
    entries = {spec: {}} if isinstance(spec, str) else spec
    if len(entries) != 1:
        raise MethodError(f"head={spec!r}; write one head, as in 'linear' or {{'mlp': {{'hidden': 128}}}}")
    ((name, options),) = entries.items()
    if re.fullmatch(r"[0-9]c[1-9]f", name) and not options:
        return Conv(outputs, name)
    if name not in _KINDS:
        raise MethodError(nearest(name, [*_KINDS, "1c2f"], "head"))
    known = [field.name for field in dataclasses.fields(_KINDS[name])][1:]
    for option in options or {}:
        if option not in known:
            raise MethodError(f"head {name}: " + (nearest(option, known, "option") if known else "it has no options"))
    made: HeadBuilder = _KINDS[name](outputs, **(options or {}))
    return made
