"""MAN by hand, with every choice that its bridge has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from localgrad import bridges
from localgrad.method import Method


def bridged(base: Method, **choices: Any) -> Method:
    """``base`` whose heads look through `localgrad.bridges.Momentum` of these choices."""
    bridge = bridges.chain(base.bridge, bridges.Momentum(**choices))
    return replace(base, name=f"man({base.name})", bridge=bridge)
