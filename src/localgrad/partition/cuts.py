"""Cut points: the places in a model that a single tensor with gradient crosses."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from localgrad.errors import PartitionError, nearest
from localgrad.layout import Layout, layout_of
from localgrad.partition.blocks import Block, RecomputedBlock, chain, join, split
from localgrad.partition.trace import Taps, attribute, channels_hint, check_runs, note_values, trace, writes_in_place


@dataclass(frozen=True)
class Cut:
    """A place where a block may begin.

    Args:
        name: path of the module it begins with; ``aliases`` are other modules that begin at the same place.
        position: how many nodes of the full trace run before it.
        shape: of the example's features there.
        channels_hint: where the neighbouring layers look for channels.
        tail: whether only a classifier follows: no layer with weight matrices whose output has positions.
        overwritten: the module or function that overwrites the features in place, if one does.
    """

    name: str
    aliases: tuple[str, ...]
    position: int
    shape: tuple[int, ...]
    channels_hint: Literal["first", "last"] | None
    tail: bool
    overwritten: str | None = None


@dataclass(frozen=True)
class Unit:
    """One of the model's own modules that run after a boundary, with the layouts of what it reads and returns."""

    name: str
    module: nn.Module
    reads: Layout
    returns: Layout

    @property
    def changes_form(self) -> bool:
        """Whether it begins a stage: another width or resolution leaves it than enters it."""
        return self.reads != self.returns


class Called(nn.Module):
    """A module that needs more than the features, with the other arguments of the example; returns the features only.

    Args:
        module: a module of the model.
        arguments: the positional arguments behind the features; ``named`` the keyword arguments.
    """

    def __init__(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.arguments, self.named = module, arguments, named

    def forward(self, features: Tensor) -> Tensor:
        result = self.module(features, *self.arguments, **self.named)
        return next(value for value in tree_leaves(result) if isinstance(value, Tensor))


def is_unit(module: nn.Module) -> bool:
    """Whether a block may begin with this module: layers with weight matrices or modules that contain some.

    A norm, activation, pooling or dropout layer belongs to what runs before it.
    """
    return any(parameter.dim() >= 2 for parameter in module.parameters())


class Partition:
    """A model, an example, and every cut point; makes blocks.

    Args:
        model: traced in eval mode, left as it was.
        example: a batch shaped as in training: a tensor, or a tuple of tensors for several positional inputs.
        taps: paths of modules whose outputs may cross boundaries detached because a later head reads them; or ``auto``
            for every value that the features at a boundary are themselves computed from.
    """

    def __init__(self, model: nn.Module, example: Any, taps: Taps = ()) -> None:
        self.model = model
        self.example = example
        self.taps: Taps = taps if taps == "auto" else tuple(taps)
        self.modules = dict(model.named_modules())
        for name in () if taps == "auto" else taps:
            if name not in self.modules:
                raise PartitionError(f"taps: {nearest(name, self.modules, 'module')}")
        check_runs(model, example)
        self.traced = trace(model, len(example) if isinstance(example, (tuple, list)) else None)
        note_values(self.traced, model, example)
        self._index = {node: index for index, node in enumerate(self.traced.nodes)}
        self._weighted = self._weighted_nodes()
        self.cuts = self._find()
        self._units: list[Block] | None = None

    def _candidates(self) -> dict[int, list[str]]:
        at: dict[int, list[str]] = {}
        for path, position in self.traced.entered.items():
            if path and is_unit(self.modules[path]):
                at.setdefault(position, []).append(path)
        return at

    def _cut(self, position: int, names: list[str], node: fx.Node) -> Cut:
        first_users = [user for user in node.users if writes_in_place(user, self.traced.root)]
        later = set(self.traced.nodes[position:])
        overwriting = next((user for user in first_users if user in later), None)
        shape = node.meta.get("shape", ())
        names = sorted(names, key=lambda name: (name.count("."), len(name)))
        return Cut(
            names[0],
            tuple(names[1:]),
            position,
            shape,
            channels_hint(node, self.traced),
            not any(position <= index and _has_positions(node) for index, node in self._weighted),
            None if overwriting is None else str(overwriting.target).removeprefix("model."),
        )

    def _find(self) -> tuple[Cut, ...]:
        cuts: list[Cut] = []
        shared = self._shared_parameters()
        for position, names in sorted(self._candidates().items()):
            start = cuts[-1].position if cuts else 0
            if not any(start <= index < position for index, _ in self._weighted):
                continue  # between two cut points lies at least one layer with weights
            if any(first < position <= last for first, last in shared):
                continue
            crossing = self.traced.features(position, self.taps)
            if len(crossing) != 1 or not 2 <= len(crossing[0].meta.get("shape", ())) <= 4:
                continue
            cut = self._cut(position, names, crossing[0])
            inside = any(cut.name.startswith(other.name + ".") for other in cuts)
            if cut.overwritten is None and not (inside and self.taps == "auto"):
                cuts.append(cut)
        return tuple(cuts)

    def _weighted_nodes(self) -> list[tuple[int, fx.Node]]:
        """Calls of layers with weight matrices, with their positions."""
        root = self.traced.root
        calls = ((index, node) for node, index in self._index.items() if node.op == "call_module")
        return [(index, node) for index, node in calls if is_unit(root.get_submodule(str(node.target)))]

    def _shared_parameters(self) -> list[tuple[int, int]]:
        """First and last use of every parameter that is used more than once."""
        uses: dict[nn.Parameter, list[int]] = {}
        for node, index in self._index.items():
            if node.op == "call_module":
                for parameter in self.traced.root.get_submodule(str(node.target)).parameters():
                    uses.setdefault(parameter, []).append(index)
            elif node.op == "get_attr" and isinstance(
                value := attribute(self.traced.root, str(node.target)), nn.Parameter
            ):
                uses.setdefault(value, []).extend(self._index[user] for user in node.users)
        return [(min(indices), max(indices)) for indices in uses.values() if len(indices) > 1]

    def named(self, names: Sequence[str], *, spans_wider_than_one: bool) -> tuple[Cut, ...]:
        """The cut points that begin with the modules ``names``, in the order they run.

        Raises:
            PartitionError: a module does not exist, never runs, or cannot begin a block.
        """
        by_name = {name: cut for cut in self.cuts for name in (cut.name, *cut.aliases)}
        chosen: dict[int, Cut] = {}
        for name in names:
            cut = by_name.get(name) or self._explicit(name, spans_wider_than_one)
            if cut.position in chosen:
                raise PartitionError(
                    f"cuts={tuple(names)}: {name!r} begins where {chosen[cut.position].name!r} does; name it once"
                )
            chosen[cut.position] = cut
        return tuple(cut for _, cut in sorted(chosen.items()))

    def _explicit(self, name: str, spans_wider_than_one: bool) -> Cut:
        valid = ", ".join(repr(cut.name) for cut in self.cuts[:6]) + (", ..." if len(self.cuts) > 6 else "")
        if name not in self.modules:
            raise PartitionError(f"cuts: {nearest(name, self.modules, 'module')}")
        position = self.traced.entered.get(name)
        if position is None:
            raise PartitionError(
                f"cuts: module {name!r} exists but is not reached by tracing (it never runs, or runs inside a module "
                f"that is kept whole); blocks may begin with {valid}"
            )
        crossing = self.traced.features(position, self.taps)
        if not crossing:
            raise PartitionError(f"cuts: nothing is computed before {name!r}; blocks may begin with {valid}")
        if len(crossing) > 1:
            values = ", ".join(f"{node.name} {node.meta.get('shape', '')}" for node in crossing)
            raise PartitionError(
                f"cuts: {name!r} is no cut point: {len(crossing)} tensors with gradient cross there ({values}). Blocks "
                f"may begin with {valid}. If a later head reads the earlier one, name the module that returns it in "
                'taps=(...), or write taps="auto".'
            )
        cut = self._cut(position, [name], crossing[0])
        if cut.overwritten is not None and spans_wider_than_one:
            raise PartitionError(
                f"cuts: {name!r}: {cut.overwritten!r} overwrites the features at this boundary in place, but a span "
                f"wider than one block still needs them; cut after it, or build that layer with inplace=False. "
                f"Blocks may begin with {valid}"
            )
        return cut

    def blocks(self, cuts: Sequence[Cut]) -> list[Block]:
        """The blocks between ``cuts``; they share the model's parameters."""
        return split(self.model, self.example, [cut.name for cut in cuts], self.taps, self.traced.structured)

    def recomputed_blocks(self, cuts: Sequence[Cut], which: Sequence[int]) -> list[Block | RecomputedBlock]:
        """The same, those with the indices ``which`` recomputed unit by unit.

        Raises:
            PartitionError: there is no such block, or it has one unit.
        """
        edges = [0, *(cut.position for cut in cuts), len(self.traced.nodes)]
        points, sizes = list(cuts), [1] * (len(cuts) + 1)
        for index in which:
            if not 0 <= index <= len(cuts):
                raise PartitionError(f"recompute={tuple(which)}: there are {len(cuts) + 1} blocks, counted from 0")
            inner = [cut for cut in self.cuts if edges[index] < cut.position < edges[index + 1]]
            if not inner:
                begins = repr(cuts[index - 1].name) if index else "the input"
                raise PartitionError(
                    f"recompute={tuple(which)}: block {index}, from {begins} on, is a single unit, with no cut point "
                    "inside to recompute from; leave it out"
                )
            points += inner
            sizes[index] += len(inner)
        parts = self.blocks(sorted(points, key=lambda cut: cut.position))
        return join(self.model, parts, sizes)

    @property
    def units(self) -> list[Block]:
        """The finest blocks: one for each cut point, and the stem before them."""
        if self._units is None:
            self._units = self.blocks(self.cuts)
        return self._units

    def units_after(self, cut: Cut) -> tuple[Unit, ...]:
        """The model's modules that the units from ``cut`` on consist of, as far as each is one module."""
        units = (cut, *(other for other in self.cuts if other.position > cut.position and not other.tail))
        layouts = [shape_layout(one.shape, self.example, one.channels_hint) for one in units]
        ends = [*layouts[1:], layouts[0] if cut.tail else self.final_layout]
        paths = [self._unit_path(one) for one in units]
        return tuple(
            Unit(path, self._callable(path), reads, returns)
            for path, reads, returns in zip(paths, layouts, ends, strict=True)
        )

    def _callable(self, path: str) -> nn.Module:
        """A module, such that it can be called with the features alone if what else it needs holds no tensor."""
        module, traced = self.modules[path], self.traced
        arguments, named = traced.calls.get(path, ((), {}))
        if not arguments or arguments[0] not in traced.differentiable:
            return module
        signature = inspect.signature(module.forward).parameters.values()
        needed = [p for p in signature if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        others = fx.node.map_arg((arguments[1:], named), lambda node: traced.plain.get(node, node))
        computed = any(isinstance(value, fx.Node) for value in tree_leaves(others))
        if computed or (len(needed) < 2 and path not in traced.structured):
            return module
        return Called(module, *others)  # type: ignore[misc]

    @property
    def kept_whole(self) -> str:
        """The end of an error message: which modules hide cut points because they cannot be traced, and the way out."""
        hidden = {path: why for path, why in self.traced.opaque.items() if is_unit(self.modules[path])}
        if not hidden:
            return ""
        path = max(hidden, key=lambda path: sum(p.numel() for p in self.modules[path].parameters()))
        return (
            f". It is cut around {path!r}, which cannot be traced: {hidden[path]}. To cut inside, pass modules=[...], "
            "modules that run one after the other"
        )

    @property
    def num_units(self) -> int:
        """Units of the whole model: what runs before the first cut point, and one for each cut point but a tail."""
        return 1 + sum(not cut.tail for cut in self.cuts)

    def _unit_path(self, cut: Cut) -> str:
        """The largest module that begins at ``cut`` and holds no later cut point."""
        later = [other.name for other in self.cuts if other.position > cut.position]
        names = sorted((cut.name, *cut.aliases), key=lambda name: name.count("."))
        return next((n for n in names if not any(other.startswith(n + ".") for other in later)), names[-1])

    @property
    def final_layout(self) -> Layout:
        """Layout of the last features before the model's last layer that still have positions."""
        end = self._weighted[-1][0] if self._weighted else len(self._index)
        candidates = (
            n for n, index in reversed(self._index.items()) if index < end and n in self.traced.differentiable
        )
        last = next((node for node in candidates if _has_positions(node)), None)
        if last is None:
            return shape_layout(self.cuts[-1].shape, self.example, None)
        return shape_layout(last.meta["shape"], self.example, channels_hint(last, self.traced))


def _has_positions(node: fx.Node) -> bool:
    shape = node.meta.get("shape", ())
    return len(shape) == 3 or (len(shape) == 4 and shape[1:3] != (1, 1) and shape[2:] != (1, 1))


def shape_layout(shape: tuple[int, ...], example: Any, hint: Literal["first", "last"] | None) -> Layout:
    """The layout of features of one shape."""
    inputs = example[0] if isinstance(example, (tuple, list)) else example
    return layout_of(inputs.new_empty(()).expand(shape), inputs, hint)


class Chain:
    """A partition given as a list of modules: what `Partition` offers to a `localgrad.method.Site`, without tracing."""

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], example: Any) -> None:
        if len(modules) < 1:
            raise PartitionError("modules=[]: name at least one module")
        self.model, self.example, self.modules = model, example, tuple(modules)
        self.units = chain(model, modules)
        self.cuts: tuple[Cut, ...] = ()

    def measured(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Cut, ...]:
        """The cut points, once the shape of the features at each is known."""
        self.cuts = tuple(
            Cut(f"modules[{k}]", (), k, shape, None, len(shape) == 2) for k, shape in enumerate(shapes, start=1)
        )
        return self.cuts

    def units_after(self, cut: Cut) -> tuple[Unit, ...]:
        """The modules from ``cut`` on, as they were given; the last is left out unless it is the only one."""
        layouts = [shape_layout(one.shape, self.example, one.channels_hint) for one in self.cuts]
        return tuple(
            Unit(one.name, self.modules[one.position], layouts[k], layouts[min(k + 1, len(layouts) - 1)])
            for k, one in enumerate(self.cuts)
            if one.position == cut.position or cut.position < one.position < len(self.modules) - 1
        )

    @property
    def num_units(self) -> int:
        """Modules that were given, the last one left out."""
        return len(self.modules) - 1

    @property
    def final_layout(self) -> Layout:
        """Layout of the last features that still have positions."""
        last = next((c for c in reversed(self.cuts) if not c.tail), self.cuts[-1])
        return shape_layout(last.shape, self.example, last.channels_hint)
