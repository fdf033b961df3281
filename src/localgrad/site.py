"""Where an auxiliary network is to be built, and what builds one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from localgrad.batches import only_read
from localgrad.errors import MethodError, PartitionError
from localgrad.layout import Layout, layout_of
from localgrad.partition import Cut, Partition, Unit
from localgrad.spans import Span


@dataclass(frozen=True)
class Site:
    """A boundary at which an auxiliary network is to be built.

    Args:
        span: the span whose loss it serves; the features are those at boundary ``span.stop``.
        num_blocks: K.
        features: an example of them, as the model produced it.
        inputs: the first tensor of the example given to the model, ``(B, C, H, W)`` for images.
        cut: the cut point, and ``partition`` the model it belongs to.
        patches: how many of these features lie side by side along each side of the whole ones.
    """

    span: Span
    num_blocks: int
    features: Tensor
    inputs: Tensor
    cut: Cut
    partition: Partition
    patches: int = 1

    @cached_property
    def layout(self) -> Layout:
        """Where channels, positions and prefix tokens lie in the features.

        Raises:
            PartitionError: features of three dimensions, and no layer tells which are the channels.
        """
        later = (cut for cut in self.partition.cuts if cut.position > self.cut.position)
        dim = self.features.dim()
        alike = next((cut for cut in (self.cut, *later) if len(cut.shape) == dim), None)  # a bridge may make tokens
        hint = None if alike is None else alike.channels_hint
        if alike is not None and dim == 3 and hint is None:
            raise PartitionError(
                f"after block {self.span.stop - 1} features of shape {tuple(self.features.shape)} may be signals "
                "(B, C, L) or tokens (B, T, C), and no layer next to the boundary (Conv1d, BatchNorm1d, Linear, "
                "LayerNorm, ...) tells; pass an example in which both sides differ in length, or cut elsewhere "
                f"(cuts=...) than at {alike.name!r}"
            )
        return layout_of(self.features, self.inputs, hint)

    @property
    def channels(self) -> int:
        """Width of the features."""
        return self.layout.channels

    @property
    def final_channels(self) -> int:
        """Width of the last features of the model that still have positions."""
        return self.partition.final_layout.channels

    @property
    def in_last_stage(self) -> bool:
        """Whether the features are at the model's last resolution, or below it."""
        final = self.partition.final_layout.grid
        return all(self.patches * a <= b for a, b in zip(self.layout.grid, final, strict=False))

    @cached_property
    def next_units(self) -> tuple[Unit, ...]:
        """The model's own modules that run next, from the first one that reads features of this width on.

        That is the one right after the boundary, unless a bridge has already led past it. None where what runs next
        also reads earlier features (a decoder with skips): a copy would need those too. They end where they cannot run
        one behind the other.

        Raises:
            MethodError: no later unit reads features of this width.
        """
        units = self.partition.units_after(self.cut)
        form = (self.layout.kind, self.layout.channels)
        start = next((k for k, unit in enumerate(units) if (unit.reads.kind, unit.reads.channels) == form), None)
        if units[0].reads_taps:
            return ()
        if start is None:
            raise MethodError(
                f"after block {self.span.stop - 1} a copy of a later unit should read features of shape "
                f"{tuple(self.features.shape)}, but none of {', '.join(unit.name for unit in units)} reads "
                f"{self.layout.channels} channels; leave out one of the plug-ins that look through later units"
            )
        alone = tuple(itertools.takewhile(lambda unit: not unit.reads_taps, units[start:]))
        return alone[: next((k for k, unit in enumerate(alone, start=1) if not unit.whole), len(alone))]

    def stage(self, ahead: bool = False) -> int:
        """The stage of the features, or past the stem that of the unit which runs next; 0 for the stem."""
        units = self.partition.units_after(self.partition.cuts[0])
        passed = len(units) - len(self.partition.units_after(self.cut))
        return 0 if passed == 0 else 1 + sum(unit.changes_form for unit in units[1 : passed + ahead])

    @property
    def units_passed(self) -> int:
        """Units of the model that run before the boundary, the stem counted as one."""
        return self.partition.num_units - len(self.partition.units_after(self.cut))

    def beyond(self, bridge: nn.Module) -> Site:
        """The same site, seen through a bridge.

        Raises:
            MethodError: the bridge does not run on the features, or overwrites them.
        """
        bridge.to(self.features).eval()
        try:
            with torch.no_grad(), only_read(self.features, self.span.stop - 1):
                return replace(self, features=bridge(self.features))
        except MethodError:
            raise
        except Exception as error:  # a copied unit may fail in any way outside its place
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise MethodError(
                f"after block {self.span.stop - 1} copies of the model's own units (from {self.cut.name!r} on) "
                f"do not run on features of shape {tuple(self.features.shape)}: {reason}. Cut elsewhere, or "
                "use a method without a bridge"
            ) from error


@dataclass(frozen=True)
class Ramp:
    """A weight that runs linearly over the boundaries, from ``first`` at the first to ``last`` at the last one.

    ``first + (last - first) * k / (K - 2)`` at the boundary after block ``k``; ``first`` if there is only one.
    """

    first: float
    last: float

    def __call__(self, site: Site) -> float:
        inner = site.num_blocks - 2
        share = (site.span.stop - 1) / inner if inner > 0 else 0.0
        return self.first * (1.0 - share) + self.last * share


@dataclass(frozen=True)
class Stages:
    """A weight for each stage of the network, the stem's first; a stage begins where the grid or the width changes.

    The stage is that of the features, or with ``ahead``, past the stem, that of the unit which runs next.
    """

    values: tuple[float, ...]
    ahead: bool = False

    def __call__(self, site: Site) -> float:
        stage = site.stage(self.ahead)
        if stage >= len(self.values):
            raise MethodError(
                f"weights {self.values} are for a stem and {len(self.values) - 1} stages; after block "
                f"{site.span.stop - 1} stage {stage} is read. Give one more weight, or two for a ramp"
            )
        return self.values[stage]


Weight = float | Callable[[Site], float]


@dataclass(frozen=True)
class Only:
    """``weight``, at the sites where ``at`` holds; elsewhere 0, so that nothing is built."""

    weight: Weight
    at: Callable[[Site], bool]

    def __call__(self, site: Site) -> float:
        if not self.at(site):
            return 0.0
        return self.weight(site) if callable(self.weight) else self.weight


def on_block(site: Site) -> bool:
    """Whether the loss trains a single block."""
    return site.span.stop - site.span.start == 1


def on_window(site: Site) -> bool:
    """Whether the loss trains several blocks."""
    return not on_block(site)


def on_stem(site: Site) -> bool:
    """Whether the features are those of the stem."""
    return site.stage() == 0


def past_stem(site: Site) -> bool:
    """Whether the features are those of a later unit."""
    return not on_stem(site)


HeadBuilder = Callable[[Site], nn.Module]
BridgeBuilder = Callable[[Site], nn.Module | None]
