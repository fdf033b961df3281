"""Blocks of one network on different ranks: features travel forward, gradients back only where a span crosses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from localgrad.distributed.agreement import agree, explained, facts_about
from localgrad.distributed.compression import Wire
from localgrad.distributed.crossing import blocks_of
from localgrad.distributed.data_parallel import axis, digest_of
from localgrad.distributed.placement import runs_of
from localgrad.distributed.stage import Stage
from localgrad.errors import ConfigError, MethodError, nearest
from localgrad.network import LocalNetwork
from localgrad.spans import groups


def block_parallel(
    network: LocalNetwork,
    mesh: DeviceMesh,
    *,
    place: Sequence[int] | None = None,
    depth: int = 2,
    wire: Wire = "same",
) -> LocalNetwork:
    """Keep some of the blocks of ``network`` on each rank of ``mesh`` and let the others be trained elsewhere.

    The loop stays as it is: every rank runs it, for as many steps, with a call of `localgrad.exchange` after each
    optimizer step, and calls ``network.stage.close()`` behind it. Only the first rank's inputs and targets are looked
    at; the others may pass None. Weights are bit for bit those of a single process with the same batches, under
    `localgrad.keyed_randomness` also with dropout:

    - Each rank runs its blocks as modules of their own (`localgrad.separate_blocks`), which torch.fx or a list
      of modules must give; they compute what the model's own forward does.
    - What a rank does, and in which order, are the rows of `localgrad.distributed.rows.rank_table`. Features, and the
      targets, are sent as soon as the last block of a rank has run forward, before its loss and backward pass. Batches
      are trained in order and each message is taken once, so nothing is ever stale.
    - Where a span crosses ranks (windows, guided steps, end-to-end training), its gradient comes back. A rank runs all
      micro-batches of a step forward before it waits for the first gradient: give such methods several,
      ``methods.accumulation(method, parts=4)``.
    - Where a bridge has twins of units on a later rank, that rank sends their weights after each step. A twin that
      moves ``after`` the step keeps the next step's loss waiting for them; one that moves ``before`` it has a step of
      slack.

    Parameters of the other ranks' blocks are given up: they become NaN, take no memory, and need no gradient. Build
    optimizers afterwards. ``network.stage.gather()`` puts them back.

    Args:
        network: from `localize`, with equal arguments and weights on every rank.
        mesh: of one dimension, or with one called ``block``.
        place: the rank of each block along that dimension, ``[0, 0, 1, 1]``; None gives each rank about equally many
            parameters in training. `localgrad.distributed.placement.balanced` makes one from measured costs.
        depth: batches a rank may be ahead of the next one; each takes memory for one batch of features on both.
        wire: ``same`` sends features as they are; ``bf16`` or ``int8`` in fewer bytes, see
            `localgrad.distributed.compression.compressed`. Blocks behind a boundary between ranks are then trained and
            evaluated on rounded features: weights are no longer those of a single process. Targets, and weights that
            twins follow, are never rounded.

    Returns:
        the same network; ``network.stage`` is its `Stage`.

    Raises:
        ConfigError: ranks differ, there are more of them than blocks, or a placement is not in order.
        MethodError: the method computes something over all blocks, or between blocks, that does not travel; or
            ``wire`` would round features whose gradient comes back.
        PartitionError: the model has no blocks that can be called one by one.

    Source: forward-only pipelines of local learning: Decoupled Greedy Learning (Belilovsky et al., ICML 2020,
    arXiv:1901.08164, synchronous form); windows as in interlocking back-propagation (Gomez et al., JMLR 23(171), 2022).
    Differs: equal to a single process by construction; nothing is replayed, recomputed for sending or used twice.
    """
    group = axis(mesh, "block").get_group()
    runs = runs_of(network, group.size(), place)
    if depth < 1:
        raise ConfigError(f"depth={depth}; at least one batch has to travel, depth=2 lets the next one follow")
    check_method(network, runs)
    check_wire(network, runs, wire)
    blocks = blocks_of(network)
    with explained("comparing networks"):
        weights = digest_of(network.parameters()).tolist()
        options = {"weights": f"{weights}", "placement": f"{list(runs)}", "depth": f"{depth}", "wire": wire}
        agree(group, facts_about(network) | options)
    network.stage = Stage(network, blocks, group, runs, depth, wire)
    return network


def check_method(network: LocalNetwork, runs: Sequence[range]) -> None:
    """Raise `MethodError` if a method needs something of other ranks that is not sent."""
    if len(runs) < 2:
        return
    method = network.method
    reasons = [rule.reason for rule in network.rules if not rule.travels]
    if method.contexts:
        reasons.append("computes something over the whole model before each batch (a teacher's answer, say)")
    if _heads_read_elsewhere(network, runs):
        reasons.append("has a head that reads parameters of a block on another rank (the model's output matrix, say)")
    if method.accumulate.parts > 1 and _moves_between_parts(network):
        reasons.append("moves buffers of twins between micro-batches")
    for reason in reasons:
        raise MethodError(
            f"{method.name} {reason}, which does not travel between ranks; train it in one process or with "
            "localgrad.distributed.data_parallel"
        )


def _home(network: LocalNetwork) -> dict[int, int]:
    """The block of each parameter of the model, by identity."""
    return {id(p): block for block in range(network.num_blocks) for p in network.parameters_of(block)}


def _heads_read_elsewhere(network: LocalNetwork, runs: Sequence[range]) -> bool:
    """Whether an auxiliary module holds, not as its own, a parameter that is trained on another rank."""
    home = _home(network)
    for run in runs:
        for boundary in range(run.start + 1, run.stop + 1):
            for _, auxiliary in network.auxiliaries_at(boundary):
                held = tree_leaves([vars(module) for module in auxiliary.modules()])
                if any(home.get(id(value), run.start) not in run for value in held):
                    return True
    return False


def _moves_between_parts(network: LocalNetwork) -> bool:
    """Whether twins take buffers of a block that, in one process, has seen a part of the batch by then.

    Such are the blocks that a span links with the one before the twin; the others begin the batch afterwards.
    """
    num_blocks = network.num_blocks
    home = _home(network)
    linked = [group for spans in network.method.spans.patterns(num_blocks) for group in groups(spans, num_blocks)]
    for boundary in range(1, num_blocks):
        for twin in network.twins_at(boundary):
            moves = twin.exchange == "before" and twin.buffers != "none"
            sources = {home[id(p)] for p in twin.source.parameters() if moves and id(p) in home}
            if any(boundary - 1 in group and sources & set(group) for group in linked):
                return True
    return False


def check_wire(network: LocalNetwork, runs: Sequence[range], wire: Wire) -> None:
    """Raise if ``wire`` is not known, or would round features through which a gradient has to come back."""
    if wire not in get_args(Wire):
        raise ConfigError(nearest(wire, get_args(Wire), "wire"))
    if wire == "same":
        return
    for run in runs[1:]:
        for span in (s for pattern in network.method.spans.patterns(network.num_blocks) for s in pattern):
            if span.start < run.start < span.stop:
                raise MethodError(
                    f"wire={wire!r} rounds the features that block {run.start} receives from another rank, but "
                    f"{network.method.name} trains blocks {span.start} to {span.stop - 1} together, so a gradient "
                    "comes back there. Write wire='same', or place these blocks on one rank (place=...)"
                )
