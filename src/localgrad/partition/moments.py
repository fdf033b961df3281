"""Cut points, from one forward in training mode: a cut is a moment on autograd's own clock.

Autograd numbers its nodes in the order in which they are made. A hook of each module reads that clock. What crosses a
moment is every tensor made before it and read by a node made after it, so each tensor is an interval::

    nodes    1 ----- 2 ----- 3 ----- 4 ----- 5 ----- 6        a moment is a cut if the engine can find what crosses:
    made     a=====================================>|           the features, which the module at the moment takes,
             |       b======>|                                  and the taps, which some module took or returned or
             |       |       c======>|                          which are local variables of a frame;
    moments  |   M1  |   M2  |   M3                             and if the features depend on every parameter before.

No tracing: any model whose outputs carry a gradient. A parameter that is read on both sides is shared.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localgrad.batches import num_samples, positional, tensors_in
from localgrad.errors import PartitionError, nearest
from localgrad.layout import Layout
from localgrad.partition.cut import Cut
from localgrad.partition.hints import Hint, channels_hint, has_positions, shape_layout
from localgrad.partition.record import Call, Graph, Listener, Taken, Value
from localgrad.partition.units import Called, Key, Unit
from localgrad.suspension.frames import outermost
from localgrad.suspension.points import Point
from localgrad.suspension.untouched import untouched

MOST_TAPS = 16
NEAR = 48  # layers a side that are asked where channels are


def is_unit(module: nn.Module) -> bool:
    """Whether a block may begin with this module: layers with weight matrices or modules that contain some.

    A norm, activation, pooling or dropout layer belongs to what runs before it.
    """
    return any(_is_matrix(parameter) for parameter in module.parameters())


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether it mixes values; a scale of shape (1, 1, C) does not."""
    return parameter.dim() == 2 or sum(side > 1 for side in parameter.shape) > 1


class Partition:
    """A model, an example, and every cut point.

    Args:
        model: run once in training mode, left as it was.
        example: a small batch shaped as in training: a tensor, a tuple of positional inputs, or a mapping of keyword
            arguments.
        shared: whether parameters may be used on both sides of a cut.

    Attributes:
        cuts: where blocks begin by default: nothing but the features crosses, or taps that only wait for a later head.
        finest: the same, and where other taps cross.
    """

    def __init__(self, model: nn.Module, example: Any, shared: bool = False) -> None:
        self.model, self.example, self.shared = model, example, shared
        self.modules = dict(model.named_modules())
        self.samples = num_samples(positional(example))
        self._record()
        if self.samples is None:
            raise PartitionError(
                f"no number of samples in the example, a {type(example).__name__}, and blocks begin at tensors with a "
                "row for each: pass tensors, or tuples, mappings and dataclasses of them"
            )
        self._weighted = self._layers()
        self._leaf_starts = [call.enter for call in self._weighted]
        self._head = self._head_position()
        self.all = self._find()
        self.cuts = tuple(cut for cut, plain in self.all if plain and (shared or not cut.shared))
        self.finest = self._finest()

    # One forward -------------------------------------------------------------------------------------------------

    def _record(self) -> None:
        listener = Listener(self.model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        try:
            with untouched(self.model, training=True), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                output = outermost(self.model, self.example)
        except Exception as error:  # a forward may fail in any way
            raise _failed(self.model, self.example, error) from error
        finally:
            listener.remove()
        outputs = [(t.grad_fn, t.output_nr) for t in tensors_in(output) if t.grad_fn is not None]
        if not outputs:
            raise PartitionError(
                f"nothing that {type(self.model).__name__} returns in training mode carries a gradient: its parameters "
                "are frozen (requires_grad=False), or its forward runs under torch.no_grad(); unfreeze what is to train"
            )
        self.graph = graph = Graph(list(dict.fromkeys(outputs)), names)
        self.calls = listener.calls
        self.known: dict[Value, str] = {}
        self.shapes: dict[Value, tuple[int, ...]] = {}
        numbers: dict[Any, int] = {}
        for call in self.calls:
            call.taken = [t._replace(value=v) for t in call.taken if (v := graph.value(t.value)) is not None]
            call.returned = [(v, s) for edge, s in call.returned if (v := graph.value(edge)) is not None]
            call.frames = {v: name for edge, name in call.frames.items() if (v := graph.value(edge)) is not None}
            for value, shape in [*((t.value, t.shape) for t in call.taken), *call.returned]:
                self.known.setdefault(value, call.name)
                self.shapes.setdefault(value, shape)
            call.same = {k: tuple(numbers.setdefault(one, len(numbers)) for one in v) for k, v in call.same.items()}
            call.overwritten = frozenset(
                k for k, (tensor, version) in call.watched.items() if tensor._version != version
            )
            call.watched = {}
        graph.forget()

    def _layers(self) -> list[Call]:
        """Calls of layers with weight matrices, in order; what contains others is none."""
        own = {n for n, m in self.modules.items() if any(_is_matrix(p) for p in m.parameters(recurse=False))}
        calls = [call for call in self.calls if call.exit and call.name in own]
        begins = [*(call.enter for call in calls), 1 << 62]
        return [call for call, following in zip(calls, begins[1:], strict=True) if following > call.exit]

    def _crossing(self, times: Sequence[int]) -> list[list[Value]]:
        """For each moment, in order: what is made before and read after it."""
        crossing: list[list[Value]] = [[] for _ in times]
        for value, reads in self.graph.reads.items():
            made, last = self.graph.times[value[0]], max(reads)
            for k in range(bisect.bisect_right(times, made), bisect.bisect_right(times, last)):
                crossing[k].append(value)
        return crossing

    # Cut points --------------------------------------------------------------------------------------------------

    def _find(self) -> list[tuple[Cut, bool]]:
        """Every cut point, and whether it is one by default."""
        calls = [c for c in self.calls if c.taken and not c.stray and is_unit(self.modules[c.name])]
        calls.sort(key=lambda c: c.enter)
        across = self._crossing([c.enter for c in calls])
        found: dict[tuple[int, Value], tuple[Cut, bool]] = {}
        for call, crossing in zip(calls, across, strict=True):
            features = self._features(call, crossing)
            if features is None:
                continue
            place = (bisect.bisect_right(self.graph.times, call.enter), features)
            if place not in found:
                plain = self._tapped(call, features, crossing) and not self._aside(call.enter)
                found[place] = (self._cut(call, features, crossing), plain)
            elif call.number == 0:
                cut, plain = found[place]
                found[place] = (cut.with_alias(call.name), plain)
        spaced: list[tuple[Cut, bool]] = []
        any_before = plain_before = 0
        for cut, plain in found.values():  # between two cut points lies at least one layer with weights
            plain = plain and not cut.overwritten and self._layers_between(plain_before, cut.position)
            if plain or self._layers_between(any_before, cut.position):
                spaced.append((cut, plain))
                any_before = cut.position
                plain_before = cut.position if plain else plain_before
        return spaced

    def _layers_between(self, start: int, stop: int) -> bool:
        return bisect.bisect_left(self._leaf_starts, start) < bisect.bisect_left(self._leaf_starts, stop)

    def _features(self, call: Call, crossing: Collection[Value]) -> Value | None:
        """What the call takes and the next block is computed from; None if this is no cut."""
        started = bisect.bisect_left(self.graph.first_reads, call.enter)
        wanted = (1 << started) - 1
        ended = bisect.bisect_left(self.graph.last_reads, call.enter)
        if ended == 0 or ended == len(self.graph.order):
            return None  # nothing to train on one side
        taken = [v for _, _, v, s in call.taken if v in crossing and 2 <= len(s) <= 5 and s[0] == self.samples]
        full = [v for v in taken if self.graph.bits[v[0]] & wanted == wanted]
        if not full or len(crossing) > MOST_TAPS + 1:
            return None
        features = max(full)
        findable = all(value in self.known or value in call.frames for value in crossing)
        return features if findable else None

    def _aside(self, moment: int) -> bool:
        """Whether a moment lies on a side branch: another one, that begins later, does more work before the two meet.

        So it is with time embeddings and networks for metadata that run first. Work is counted in values that layers
        with weights make.
        """
        before = (1 << bisect.bisect_right(self.graph.times, moment)) - 1
        own = other = 0
        apart = 0  # nodes of branches that begin later
        for call in self._weighted:
            last = bisect.bisect_left(self.graph.times, call.exit) - 1
            if last < 0 or self.graph.times[last] < call.enter:
                continue  # frozen
            above, work = self.graph.ancestors[last], math.prod(call.makes)
            if call.enter > moment and not above & before:
                other += work
                apart |= 1 << last
            elif not above & apart:
                own += work
        return other > own

    def _tapped(self, call: Call, features: Value, crossing: Sequence[Value]) -> bool:
        """Whether all goes on from ``features``, the youngest value, and others that cross only wait for a later head.

        So it is in encoders whose stages are read again by a decoder or a feature pyramid: what runs next reads the
        features, they were computed from each of the others, and each other one are maps of finer resolution, or
        nothing reads it before the model's own child that runs at the moment has ended. The input of a module that is
        still running, such as the shortcut of a residual unit, does not wait for a head.
        """
        graph, moment = self.graph, call.enter
        if not (others := set(crossing) - {features}):
            return True
        running = [c for c in self.calls if c.enter < moment < c.exit]
        end = min((c.exit for c in running if "." not in c.name), default=moment)
        if features not in self._reads_first(moment, crossing):
            return False
        above = graph.ancestors[features[0]]
        for other in others:
            uses = [time for time in graph.reads[other] if time > moment]
            finer = self._side(other) > self._side(features) > 0
            if not above >> other[0] & 1 or not (finer or (end > moment and min(uses) >= end)):
                return False
            for outer in running:
                if graph.times[other[0]] < outer.enter and min(uses) < outer.exit:
                    (entering,) = self._crossing([outer.enter])
                    if other in self._reads_first(outer.enter, set(entering)):
                        return False
        return True

    def _reads_first(self, moment: int, values: Collection[Value]) -> list[Value]:
        for index in range(bisect.bisect_right(self.graph.times, moment), len(self.graph.times)):
            if reading := [value for value in self.graph.inputs[index] if value in values]:
                return reading
        return []

    def _side(self, value: Value) -> int:
        """Height of maps in positions, length of signals; 0 for other values."""
        shape = self.shapes.get(value, ())
        if not 3 <= len(shape) <= 5:
            return 0
        hint = self._channels_hint(self.graph.times[value[0]], shape)
        if len(shape) == 3 and hint != "first":
            return 0  # tokens
        return shape[1] if hint == "last" else shape[2]

    def _cut(self, call: Call, features: Value, crossing: Sequence[Value]) -> Cut:
        leaf, _, _, shape = next(taken for taken in call.taken if taken.value == features)
        moment = call.enter
        later = (c for c in self._weighted if c.enter >= moment)
        shared = [n for n, reads in self.graph.readers.items() if min(reads) < moment <= max(reads)]
        return Cut(
            call.name,
            (),
            moment,
            shape,
            self._channels_hint(moment, shape),
            moment >= self._head or not any(has_positions(c.makes) for c in later),
            Point(call.name, call.number, leaf),
            leaf in call.overwritten,
            tuple(self.known.get(value) or call.frames[value] for value in crossing if value != features),
            tuple(shared),
        )

    def _finest(self) -> tuple[Cut, ...]:
        """Cut points where taps cross too, as long as the features are computed from them; outermost modules only."""
        chosen: list[Cut] = []
        for cut, plain in self.all:
            inside = any(cut.name.startswith(other.name + ".") for other in chosen)
            allowed = (self.shared or not cut.shared) and not cut.overwritten and (plain or not inside)
            if allowed and not self._aside(cut.position):
                chosen.append(cut)
        return tuple(chosen)

    def _channels_hint(self, moment: int, shape: tuple[int, ...]) -> Hint:
        """Where the layers next to a moment look for channels."""
        at = bisect.bisect_left([call.enter for call in self.calls], moment)
        behind = [(self.modules[call.name], call.reads) for call in self.calls[at : at + NEAR]]
        before = [(self.modules[call.name], call.makes) for call in self.calls[max(at - NEAR, 0) : at]]
        return channels_hint(behind, before[::-1], shape)

    def looked_for(self, name: str) -> Hint:
        """Where channels are looked for in what the module ``name`` takes first, if it is called."""
        call = next((call for call in self.calls if call.name == name), None)
        return None if call is None else self._channels_hint(call.enter, call.reads)

    def _head_position(self) -> int:
        """Where the model's own head begins if it answers with positions, as in segmentation; else the end.

        The head are those parts of the model from which nothing goes on to another part.
        """
        end = 1 << 62
        if not self._weighted or not has_positions(self._weighted[-1].makes):
            return end
        paths = [call.name.split(".") for call in self._weighted]
        levels = zip(*(path[:-1] for path in paths), strict=False)
        shared = len(list(itertools.takewhile(lambda names: len(set(names)) == 1, levels)))
        parts = [".".join(path[: shared + 1]) for path in paths]
        going_on: set[str] = set()
        above: list[frozenset[str]] = []
        for index, time in enumerate(self.graph.times):
            before = frozenset().union(*(above[j] for j, _ in self.graph.inputs[index]))
            k = bisect.bisect_left(self._leaf_starts, time) - 1
            if k >= 0 and time < self._weighted[k].exit:
                going_on |= before - {parts[k]}
                before |= {parts[k]}
            above.append(before)
        entered = {call.name: call.enter for call in reversed(self.calls)}
        return min((entered.get(part, end) for part in {*parts} - going_on), default=end)

    # What is asked about cuts ------------------------------------------------------------------------------------

    def named(self, names: Sequence[str]) -> tuple[Cut, ...]:
        """The cut points that begin with the modules ``names``, in the order they run.

        Raises:
            PartitionError: a module does not exist, never runs, or cannot begin a block.
        """
        chosen: dict[int, Cut] = {}
        for name in names:
            cut = self._named(name)
            if cut.position in chosen:
                raise PartitionError(
                    f"cuts {tuple(names)}: {name!r} begins where {chosen[cut.position].name!r} does; name it once"
                )
            chosen[cut.position] = cut
        return tuple(cut for _, cut in sorted(chosen.items()))

    def _named(self, name: str) -> Cut:
        known = {alias: cut for cut, _ in reversed(self.all) for alias in (cut.name, *cut.aliases)}
        valid = ", ".join(repr(cut.name) for cut in (self.cuts or self.finest)[:6])
        valid = f"blocks may begin with {valid or 'nothing'}{', ...' * (len(self.cuts) > 6)}"
        if name in known:
            cut = known[name]
            if cut.shared and not self.shared:
                raise PartitionError(
                    f"cuts: parameter {cut.shared[0]!r} is used before and after {name!r}, so two losses would train "
                    "it; write localize(..., shared=True) to let both, or untie it (copy.deepcopy); "
                    f"without shared parameters {valid}"
                )
            return cut
        if name not in self.modules:
            raise PartitionError(f"cuts: {nearest(name, self.modules, 'module')}")
        call = next((c for c in self.calls if c.name == name), None)
        if call is None:
            raise PartitionError(f"cuts: module {name!r} exists but is not called in training mode; {valid}")
        if not call.differentiable:
            raise PartitionError(
                f"cuts: {name!r} runs under torch.no_grad(), or under torch.utils.checkpoint with use_reentrant=True; "
                f"write use_reentrant=False; {valid}"
            )
        if not call.taken:
            raise PartitionError(
                f"cuts: {name!r} takes nothing that was computed from parameters before it, or from frozen ones only; "
                f"{valid}"
            )
        started = bisect.bisect_left(self.graph.first_reads, call.enter)
        ended = bisect.bisect_left(self.graph.last_reads, call.enter)
        if started and not ended:
            tied = ", ".join(map(repr, self.graph.order[: min(started, 3)])) + ", ..." * (started > 3)
            raise PartitionError(
                f"cuts: {name!r} is no cut point: every parameter before it ({tied}) is used again behind it, so no "
                "block would step there, nor with shared=True; cut behind their last use, or let later uses have "
                "copies (copy.deepcopy), or call the module once, on torch.stack(inputs, 1), samples first; "
                f"{valid}"
            )
        if ended in (0, len(self.graph.order)):
            raise PartitionError(
                f"cuts: {name!r} is no cut point: no parameter {'from there on' if ended else 'before it'} trains, "
                f"since all are frozen (requires_grad=False) or there is none; {valid}"
            )
        (crossing,) = self._crossing([call.enter])
        if (features := self._features(call, crossing)) is not None:  # a layer without weights, say
            cut = self._cut(call, features, crossing)
            if not cut.shared or self.shared:
                return cut
        covered = 0
        for taken in call.taken:
            covered |= self.graph.bits[taken.value[0]] if taken.value in crossing else 0
        left = [n for k, n in enumerate(self.graph.order[:started]) if not covered >> k & 1]
        if left:
            raise PartitionError(
                f"cuts: {name!r} is no cut point: what it takes does not depend on {left[0]!r}, which runs before it "
                f"on a branch of its own and would train in no block; {valid}"
            )
        lost = [value for value in crossing if value not in self.known and value not in call.frames]
        if lost:
            raise PartitionError(
                f"cuts: {name!r} is no cut point: a tensor made by {self.graph.kinds[lost[0][0]]} crosses there that "
                f"no module takes or returns and no variable holds (an attribute, a closure); {valid}"
            )
        raise PartitionError(f"cuts: {name!r} is no cut point; {valid}")

    def layer_bits(self) -> int:
        """The nodes that read a weight matrix, as bits."""
        wide = {name for name, p in self.model.named_parameters() if p.dim() >= 2}
        return sum(1 << node for node, names in self.graph.own.items() if wide.intersection(names))

    def home(self, cuts: Sequence[Cut]) -> dict[str, tuple[int, ...]]:
        """The blocks that use each parameter, and none for those that no forward uses."""
        edges = [cut.position for cut in cuts]
        first: dict[str, int] = {}
        for call in self.calls:
            first.setdefault(call.name, bisect.bisect_right(edges, call.enter))
        found: dict[str, tuple[int, ...]] = {}
        for name, _ in self.model.named_parameters():
            if (reads := self.graph.readers.get(name)) is not None:
                found[name] = tuple(sorted({bisect.bisect_left(edges, time) for time in reads}))
            else:
                owners = itertools.accumulate(name.split(".")[:-1], lambda a, b: f"{a}.{b}")
                block = next((first[owner] for owner in reversed(list(owners)) if owner in first), None)
                found[name] = () if block is None else (block,)
        return found

    def returning_several(self) -> set[str]:
        """The modules that return anything but one tensor, those of torch left out."""
        found = {call.name for call in self.calls if call.structured}
        return {name for name in found if not type(self.modules[name]).__module__.startswith("torch.nn.")}

    def units_after(self, cut: Cut) -> tuple[Unit, ...]:
        """The model's modules that the units from ``cut`` on consist of, as far as each is one module."""
        places = (cut, *(other for other in self.cuts if other.position > cut.position and not other.tail))
        layouts = {one: shape_layout(one.shape, self.example, one.channels_hint) for one in places}
        chosen: list[tuple[Cut, Call, nn.Module, bool]] = []
        for k, one in enumerate(places):
            if chosen and one.name.startswith(chosen[-1][1].name + "."):
                continue  # inside the unit before
            until = layouts[places[k + 1]] if one is not places[-1] else None
            options = ((call, *self._callable(call, cut, one)) for call in self._units_at(one, until))
            first = next(options)
            chosen.append((one, *(first if first[2] else next((o for o in options if o[2]), first))))
        last = layouts[cut] if cut.tail else self.final_layout
        ends = [*(layouts[one] for one, *_ in chosen[1:]), last]
        return tuple(
            Unit(
                call.name,
                module,
                layouts[one],
                end,
                not complete or self._reads_taps(call, one),
                one is chosen[-1][0] or self._makes(call, end),
            )
            for (one, call, module, complete), end in zip(chosen, ends, strict=True)
        )

    def _callable(self, call: Call, cut: Cut, own: Cut) -> tuple[nn.Module, bool]:
        """A module, such that it can be called with the features alone, and whether the cut has all that it needs."""
        module = self.modules[call.name]
        here, begins = self._call_at(cut), self._call_at(own)
        wanted = begins.same[self._taken_at(own).key]
        features = [key for key, same in call.same.items() if same == wanted]
        others = {key: value for key, value in call.others.items() if key not in features}
        if not any(value is not None for value in others.values()) and features == [0] and not call.structured:
            return module, True
        sources: dict[Key, Key] = {}
        for key in (key for key in others if key in call.same):
            known = [k for k, same in here.same.items() if same == call.same[key]]
            if not known:
                return module, False
            sources[key] = key if key in known else known[0]
        return Called(module, features, others, sources), bool(features)

    def _call_at(self, cut: Cut) -> Call:
        """The call that a cut lies before."""
        return next(call for call in self.calls if (call.name, call.number) == (cut.point.name, cut.point.call))

    def _taken_at(self, cut: Cut) -> Taken:
        """What that call takes as features."""
        return next(taken for taken in self._call_at(cut).taken if taken.leaf == cut.point.leaf)

    def _reads_taps(self, call: Call, cut: Cut) -> bool:
        """Whether a module reads more than the features that cross where it begins."""
        (crossing,) = self._crossing([cut.position])
        early = set(crossing) - {self._taken_at(cut).value}
        return any(call.enter < time < call.exit for value in early for time in self.graph.reads[value])

    def _units_at(self, cut: Cut, until: Layout | None) -> Iterator[Call]:
        """The modules that begin at ``cut``, the best unit first.

        That is the largest that holds no later cut point and makes what the next unit reads; where none does, because
        what it makes is joined with another branch, the smallest that holds the branches.
        """
        later = [other.name for other in self.cuts if other.position > cut.position]
        stop = min((other.position for other in self.cuts if other.position > cut.position), default=1 << 62)
        names = sorted((cut.name, *cut.aliases), key=lambda name: name.count("."))
        calls = {call.name: call for call in reversed(self.calls)}
        alone = [calls[name] for name in names if not any(other.startswith(name + ".") for other in later)]
        holding = [calls[name] for name in reversed(names) if calls[name] not in alone]
        whole = [call for call in alone if until is None or self._makes(call, until)]
        reads = [time for time in self.graph.reads[self._taken_at(cut).value] if cut.position < time < stop]
        joined = bool(alone and holding) and not all(alone[0].enter < time < alone[0].exit for time in reads)
        rest = [*holding, *alone] if joined else [*alone, *holding]
        return iter({id(call): call for call in (*whole[:1], *rest)}.values())

    def _makes(self, call: Call, wanted: Layout) -> bool:
        """Whether a module returns features of one form; so it is taken where it is not known to return one tensor."""
        shape = call.returned[0][1] if call.returned and not call.structured else ()
        if not 2 <= len(shape) <= 5:
            return True
        made = shape_layout(shape, self.example, self._channels_hint(call.exit, shape))
        return (made.kind, made.channels) == (wanted.kind, wanted.channels)

    @property
    def num_units(self) -> int:
        """Units of the whole model: what runs before the first cut point, and one for each cut point but a tail."""
        return 1 + sum(not cut.tail for cut in self.cuts)

    @cached_property
    def final_layout(self) -> Layout:
        """Layout of the last features before the model's last layer, or its own head, that still have positions."""
        end = min(self._weighted[-1].enter, self._head) if self._weighted else 1 << 62
        seen = [
            (time, shape)
            for value, shape in self.shapes.items()
            if (time := self.graph.times[value[0]]) < end and has_positions(shape)
        ]
        if not seen:
            return shape_layout(self.cuts[-1].shape if self.cuts else (1, 1), self.example, None)
        time, shape = max(seen)
        return shape_layout(shape, self.example, self._channels_hint(time, shape))


def _failed(model: nn.Module, example: Any, error: Exception) -> PartitionError:
    given = ", ".join(_described(leaf) for leaf in tree_leaves(example))
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return PartitionError(
        f"{type(model).__name__} does not run in training mode on example={given}: {reason}. Pass a small batch shaped "
        "as in training, of at least 2 samples, with the model's dtype and on its device, such as torch.randn(2, 3, "
        "224, 224); a tuple for a model with several inputs, a mapping for keyword arguments."
    )


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
