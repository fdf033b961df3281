"""One forward over the example before training: features at the boundaries, and how what crosses them is found."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from localgrad.batches import tensors_in
from localgrad.errors import PartitionError
from localgrad.measure.memory import saved_storages
from localgrad.network import LocalNetwork
from localgrad.opened import OpenModel
from localgrad.partition import Partition
from localgrad.partition.separate import as_by_now
from localgrad.passes import Pass
from localgrad.randomness import host_state
from localgrad.spans import Span
from localgrad.suspension.frames import Tag
from localgrad.suspension.points import Watch
from localgrad.suspension.untouched import untouched
from localgrad.suspension.wrapped import check_wrapped
from localgrad.task import Batch

MOST = 0.95  # of what all blocks keep, in one block, is worth a warning
DRAWS = 3  # forwards of a model that draws: each may take other branches
TRIES = 10  # forwards that may skip the module a block begins with (layer drop) before that is an error


class _Reads(TorchDispatchMode):
    """Which block reads which storage last; ``block`` is the one that runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = 0
        self.last: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no other storage takes the place of one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (storage := _storage(tensor)) is not None:
                self.kept.append(storage)
                self.last[storage._cdata] = self.block
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> Any:
    return None if hasattr(tensor, "__tensor_flatten__") else tensor.untyped_storage()


def rehearse(network: LocalNetwork, example: Any) -> tuple[list[Tensor], Watch]:
    """Run the forward block by block without losses.

    What crosses a boundary is looked for everywhere once: in all that modules take and return, and in the local
    variables of all frames. In training only those places are looked at where something was found.

    Returns:
        the features at boundaries 1 .. K-1, and the `Watch` for training.

    Raises:
        PartitionError: the forward does not come by every cut.
    """
    watch = Watch(tuple(name for name, _ in network.suspended.named_modules() if name), frames=True)
    found: list[Places] = []
    features: list[Tensor] = []
    for turn in range(TRIES):
        with untouched(network.model, training=True), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(turn)
            before = host_state()
            network.watch = watch
            with network.opened(()) as opened:
                seen, places, kept = _walk(network, opened, example)
            drawn = host_state() != before
        if len(seen) < network.num_blocks - 1:
            continue  # it skipped a module that a block begins with
        if not found:
            features = seen
            _warn_of_one_block(network, kept)
        found.append(places)
        if not drawn or len(found) == DRAWS:
            return features, _watch(_latest(found))
    raise PartitionError(
        f"{type(network.model).__name__} did not come by every cut in {TRIES} forwards over the example: a module that "
        "a block begins with is skipped at random; cut before one that always runs"
    )


def follow_unfrozen(network: LocalNetwork) -> None:
    """Analyse and rehearse again where parameters train that never did before: what crosses may be made of them.

    Raises:
        PartitionError: the cuts are none for what trains now, or it would step with another block; or the network is on
            several ranks, sharded or resident. It has to be cut again.
    """
    new = network.trains - network.known
    if not new:
        return
    again = f"{min(new)!r} was unfrozen after the model was cut: call localize again"
    if network.stage is not None or network.residence is not None:
        raise PartitionError(f"{again}, then block_parallel or resident")
    example = as_by_now(network.running, network.partition.example)
    known, home, rules, blocks = network.known, network.home, network.rules, range(network.num_blocks)
    stepped = [id(p) for block in blocks for p in (None, *network.parameters_of(block))]
    with _training(network, known):
        try:
            check_wrapped(network.running)
            partition = Partition(network.running, example, network.partition.shared)
            cuts = partition.named([cut.name for cut in network.cuts])
        except PartitionError as error:
            raise PartitionError(f"{again}. {error}") from error
        found = partition.home(cuts)
        network.home = {name: found[name] if name in new else before for name, before in home.items()}
        moved = stepped != [id(p) for block in blocks for p in (None, *network.parameters_of(block))]
        if moved or [cut.point for cut in cuts] != [cut.point for cut in network.cuts]:
            network.home = home
            raise PartitionError(f"{again}. It trains in another block than it was counted to, or with other cuts")
        network.rules = ()
        try:
            _, network.watch = rehearse(network, example)
        finally:
            network.rules = rules
    network.reentrant |= "CheckpointFunctionBackward" in partition.graph.kinds
    network.known = known | new


@contextlib.contextmanager
def _training(network: LocalNetwork, names: Collection[str]) -> Iterator[None]:
    """Inside it, all of these parameters train."""
    frozen = [p for name, p in network.running.named_parameters() if name in names and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


Places = dict[tuple[int, Tag], tuple[int, int]]


def _walk(network: LocalNetwork, opened: OpenModel, example: Any) -> tuple[list[Tensor], Places, list[int]]:
    """The features at each boundary that was reached; what is held, by maker and tag, with the last block that reads
    it; the bytes that each block keeps for its backward pass.
    """
    spans = [Span(k, k + 1) for k in range(network.num_blocks)]
    one = Pass(network, opened, spans, Batch(example, None, 0))
    one.counts = {}
    known = [*network.model.parameters(), *network.model.buffers(), *tensors_in(example)]
    kept: list[int] = []
    own = next(network.model.parameters()).dtype
    features: list[Tensor] = []
    found: dict[tuple[int, Tag], set[int]] = {}
    with _Reads() as reads:
        for block in one.blocks:
            reads.block = block
            before = one.boundary
            _, saved = saved_storages(partial(one.run, block), known)
            kept.append(sum(saved.values()))
            reads.block = -1
            if block < network.num_blocks - 1 and one.boundary == block + 1:
                seen = one.forward.features.detach()
                # Heads have the precision of the model, whatever autocast makes of the features.
                features.append(seen.to(own) if one.forward.autocast[0] and seen.is_floating_point() else seen)
            one.graphs.clear()
            if before <= block:
                one.go_on(block + 1)  # cut from its graph now: what only the graph holds goes with it
                for held in one.held:
                    tensor = held.ref()
                    if tensor is not None and held.maker == one.boundary - 1 and (s := _storage(tensor)) is not None:
                        found.setdefault((held.maker, held.tag), set()).add(s._cdata)
                    del tensor  # or it would count as a holder
    for tensor in tensors_in(one.forward.features):  # whoever gets the model's output may read all of it
        if (storage := _storage(tensor)) is not None:
            reads.last[storage._cdata] = network.num_blocks - 1
    places = {
        (maker, tag): max(maker, *(reads.last.get(storage, maker) for storage in storages))
        for (maker, tag), storages in found.items()
        if maker < network.num_blocks - 1
    }
    for held in one.held:  # the frames are gone: a hook or an attribute keeps it
        if held.ref() is not None:
            places.pop((held.maker, held.tag), None)
    counts = {(maker, tag): one.counts.get((maker, tag, last + 1), [0]) for (maker, tag), last in places.items()}
    return features, {key: (last, min(counts[key])) for key, last in places.items()}, kept


def _latest(found: list[Places]) -> Places:
    """Of several forwards that drew, the last block that reads what is held in any of them."""
    keys = dict.fromkeys(key for places in found for key in places)
    seen = {key: [places[key] for places in found if key in places] for key in keys}
    return {key: (max(last for last, _ in ones), min(count for _, count in ones)) for key, ones in seen.items()}


def _warn_of_one_block(network: LocalNetwork, kept: list[int]) -> None:
    """Warn if one block keeps nearly everything although it could be cut."""
    largest = max(range(len(kept)), key=kept.__getitem__)
    edges = [0, *(cut.position for cut in network.cuts), 1 << 62]
    inside = [c.name for c in network.partition.finest if edges[largest] < c.position < edges[largest + 1]]
    if len(kept) > 1 and inside and kept[largest] > MOST * sum(kept):
        warnings.warn(
            f"block {largest}, from {network.begins_at(largest)} on, keeps {kept[largest] / sum(kept):.0%} of what all "
            f"blocks keep for their backward passes; cut inside it too, at "
            f"{', '.join(map(repr, inside[:4]))} for instance",
            UserWarning,
            stacklevel=4,
        )


def _watch(places: Places) -> Watch:
    modules = dict.fromkeys(tag[1] for _, tag in places if tag[0] in ("takes", "returns"))
    return Watch(tuple(modules), any(tag[0] == "frame" for _, tag in places), places)
