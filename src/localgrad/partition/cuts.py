"""Cut points: the places in a model that a single tensor with gradient crosses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn

from localgrad.errors import PartitionError, nearest
from localgrad.layout import Layout, layout_of
from localgrad.partition.blocks import Block, chain, split
from localgrad.partition.trace import channels_hint, note_values, trace, writes_in_place


@dataclass(frozen=True)
class Cut:
    """A place where a block may begin.

    Args:
        name: path of the module it begins with; ``aliases`` are other modules that begin at the same place.
        position: how many nodes of the full trace run before it.
        shape: of the example's features there.
        channels_hint: where the neighbouring layers look for channels.
        tail: whether the features have no positions left (only a classifier follows).
        overwritten: the module or function that overwrites the features in place, if one does.
    """

    name: str
    aliases: tuple[str, ...]
    position: int
    shape: tuple[int, ...]
    channels_hint: Literal["first", "last"] | None
    tail: bool
    overwritten: str | None = None


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
        taps: paths of modules whose outputs may cross boundaries detached because a later head reads them.
    """

    def __init__(self, model: nn.Module, example: Any, taps: Sequence[str] = ()) -> None:
        self.model = model
        self.example = example
        self.taps = tuple(taps)
        self.num_inputs = len(example) if isinstance(example, (tuple, list)) else None
        self.modules = dict(model.named_modules())
        for name in self.taps:
            if name not in self.modules:
                raise PartitionError(f"taps: {nearest(name, self.modules, 'module')}")
        self.traced = trace(model, self.num_inputs)
        note_values(self.traced, model, example)
        self._tap_nodes = {self.traced.returned[t] for t in self.taps if t in self.traced.returned}
        self.cuts = self._find()
        self._units: list[Block] | None = None

    def _candidates(self) -> dict[int, list[str]]:
        at: dict[int, list[str]] = {}
        for path, position in self.traced.entered.items():
            if path and is_unit(self.modules[path]):
                at.setdefault(position, []).append(path)
        return at

    def _crossing(self, position: int) -> list[fx.Node]:
        """Values with gradient that cross ``position``, taps left out."""
        crossing = self.traced.crossing(position)
        return [n for n in crossing if n in self.traced.differentiable and n not in self._tap_nodes]

    def _cut(self, position: int, names: list[str], node: fx.Node) -> Cut:
        first_users = [user for user in node.users if writes_in_place(user, self.traced.root)]
        later = {n for n in self.traced.nodes[position:]}
        overwriting = next((user for user in first_users if user in later), None)
        shape = node.meta.get("shape", ())
        names = sorted(names, key=lambda name: (name.count("."), len(name)))
        return Cut(
            names[0],
            tuple(names[1:]),
            position,
            shape,
            channels_hint(node, self.traced),
            len(shape) == 2 or (len(shape) == 4 and shape[2] == shape[3] == 1),
            None if overwriting is None else str(overwriting.target).removeprefix("model."),
        )

    def _find(self) -> tuple[Cut, ...]:
        cuts: dict[fx.Node, Cut] = {}
        for position, names in sorted(self._candidates().items()):
            crossing = self._crossing(position)
            if len(crossing) != 1 or not 2 <= len(crossing[0].meta.get("shape", ())) <= 4:
                continue
            cut = self._cut(position, names, crossing[0])
            if cut.overwritten is None and crossing[0] not in cuts:
                cuts[crossing[0]] = cut
        return tuple(cuts.values())

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
                f"cuts: module {name!r} exists but is not reached by tracing (it never runs, or runs inside a module that "
                f"is kept whole); blocks may begin with {valid}"
            )
        crossing = self._crossing(position)
        if not crossing:
            raise PartitionError(f"cuts: nothing is computed before {name!r}; blocks may begin with {valid}")
        if len(crossing) > 1:
            values = ", ".join(f"{node.name} {node.meta.get('shape', '')}" for node in crossing)
            raise PartitionError(
                f"cuts: {name!r} is no cut point: {len(crossing)} tensors with gradient cross there ({values}). Blocks may "
                f"begin with {valid}. If a later head reads the earlier one, name the module that returns it in taps=(...)."
            )
        cut = self._cut(position, [name], crossing[0])
        if cut.overwritten is not None and spans_wider_than_one:
            raise PartitionError(
                f"cuts: {name!r}: {cut.overwritten!r} overwrites the features at this boundary in place, but a span wider "
                f"than one block still needs them; cut after it, or build that layer with inplace=False. "
                f"Blocks may begin with {valid}"
            )
        return cut

    def blocks(self, cuts: Sequence[Cut]) -> list[Block]:
        """The blocks between ``cuts``; they share the model's parameters."""
        return split(self.model, self.num_inputs, [cut.name for cut in cuts], self.taps)

    @property
    def units(self) -> list[Block]:
        """The finest blocks: one for each cut point, and the stem before them."""
        if self._units is None:
            self._units = self.blocks(self.cuts)
        return self._units

    def units_after(self, cut: Cut) -> tuple[nn.Module, ...]:
        """The finest blocks that run after ``cut``, in order."""
        first = sum(other.position <= cut.position for other in self.cuts)
        return tuple(self.units[first - 1 :] if cut in self.cuts else self.units[first:])

    @property
    def final_layout(self) -> Layout:
        """Layout of the last features that still have positions."""
        cut = next((c for c in reversed(self.cuts) if not c.tail), self.cuts[-1])
        return shape_layout(cut, self.example)


def shape_layout(cut: Cut, example: Any) -> Layout:
    """The layout of the features at ``cut``, from their shape alone."""
    inputs = example[0] if isinstance(example, (tuple, list)) else example
    return layout_of(inputs.new_empty((), dtype=inputs.dtype).expand(cut.shape), inputs, cut.channels_hint)


class Chain:
    """A partition given as a list of modules: what `Partition` offers to a `localgrad.method.Site`, without tracing."""

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], example: Any) -> None:
        if len(modules) < 1:
            raise PartitionError("modules=[]: name at least one module")
        self.model, self.example = model, example
        self.units = chain(model, modules)
        self.cuts: tuple[Cut, ...] = ()

    def measured(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Cut, ...]:
        """The cut points, once the shape of the features at each is known."""
        self.cuts = tuple(
            Cut(f"modules[{k}]", (), k, shape, None, len(shape) == 2) for k, shape in enumerate(shapes, start=1)
        )
        return self.cuts

    def units_after(self, cut: Cut) -> tuple[nn.Module, ...]:
        """The modules from ``cut`` on."""
        return tuple(self.units[cut.position :])

    @property
    def final_layout(self) -> Layout:
        """Layout of the last features that still have positions."""
        return shape_layout(next((c for c in reversed(self.cuts) if not c.tail), self.cuts[-1]), self.example)
