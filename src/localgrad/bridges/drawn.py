"""A bridge whose fresh copies are drawn as the papers' releases draw them."""

from __future__ import annotations

from dataclasses import replace

from localgrad.bridges.chain import Chain
from localgrad.bridges.momentum import Momentum
from localgrad.site import BridgeBuilder


def drawn(bridge: BridgeBuilder) -> BridgeBuilder:
    """``bridge`` with ``kaiming`` for ``fresh``; see `localgrad.bridges.Momentum`."""
    if isinstance(bridge, Chain):
        return replace(bridge, first=drawn(bridge.first), second=drawn(bridge.second))
    if not isinstance(bridge, Momentum):
        return bridge
    twin, companion = ("kaiming" if init == "fresh" else init for init in (bridge.twin_init, bridge.companion_init))
    return replace(bridge, twin_init=twin, companion_init=companion)
