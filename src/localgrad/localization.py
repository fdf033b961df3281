"""From a model and a method to a network cut into blocks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from localgrad.batches import tensors_in
from localgrad.cutting import as_cutting
from localgrad.errors import MethodError, PartitionError
from localgrad.method import Auxiliary, Method
from localgrad.network import LocalNetwork, span_key
from localgrad.partition import Block, Cut, RecomputedBlock, SeparateBlocks, separate
from localgrad.partition.units import Called
from localgrad.rehearsal import rehearse
from localgrad.site import Site
from localgrad.spans import Span, check
from localgrad.suspension.untouched import untouched
from localgrad.suspension.wrapped import check_wrapped


def localize(model: nn.Module, method: Method, cutting: Any, *, example: Any, shared: bool = False) -> LocalNetwork:
    """Cut ``model`` into blocks and put the auxiliary networks of ``method`` on the boundaries.

    The model is neither copied nor edited: its own forward runs, suspended at the cuts.

    Args:
        model: any module whose outputs carry a gradient; run a few times in training mode, and left as it was.
        method: from `localgrad.methods`.
        cutting: where to cut: a number of blocks; names of the modules that blocks 1 .. K-1 begin with,
            ``("layer2", "layer3")``; a list of modules that run one after the other and together are the model; or a
            value of `localgrad.cuts`.
        example: a small batch shaped as in training, on the model's device, of at least 2 samples: a tensor,
            (B, C, H, W) for images; a tuple for several inputs; a mapping of keyword arguments.
        shared: let blocks share parameters (tied embeddings): each loss trains them, and they step with the last block
            that uses them. By default a cut between two uses is refused.

    Warns where an auxiliary network has more parameters than the whole model.

    Raises:
        PartitionError: the model cannot be cut so; the message says where it can.
        MethodError: the method trains nothing on some block.
        ConfigError: nothing fits in the memory of ``cuts.fits``.

    Example:
        >>> import torch, localgrad
        >>> model = localgrad.models.resnet32(num_classes=10)
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(10))
        >>> network = localgrad.localize(model, method, 4, example=torch.randn(2, 3, 32, 32))
        >>> [cut.name for cut in network.cuts]
        ['layer1.3', 'layer2.2', 'layer3.1']
    """
    _check_model(model)
    if not isinstance(method, Method):
        raise MethodError(f"method is {method!r}; pass a value such as localgrad.methods.dgl(task)")
    chosen = as_cutting(cutting).choose(model, method, example, shared)
    partition, cuts = chosen.partition, chosen.cuts
    count = len(cuts) + 1
    patterns = method.spans.patterns(count)
    for pattern in patterns:
        check(pattern, count)
    method.check_rules(count)
    _check_overwritten(method, cuts, patterns)
    blocks = None
    if chosen.recompute or method.recompute.blocks:
        why = (
            f"{method.name} runs blocks again in the backward pass" if method.recompute.blocks else "recomputed blocks"
        )
        several = isinstance(example, (tuple, list))
        blocks = SeparateBlocks(separate.separate_blocks(partition, cuts, chosen.recompute, why), several=several)
    network = LocalNetwork(model, method, chosen, blocks)
    network._check_holders()
    features, network.watch = rehearse(network, example)
    inputs = tensors_in(example)[0]
    for stop, start in sorted({(s.stop, s.start) for pattern in patterns for s in pattern if s.stop < count}):
        site = Site(Span(start, stop), count, features[stop - 1], inputs, cuts[stop - 1], partition)
        network.auxiliary[span_key(site.span)] = Auxiliary(method, site).train(model.training)
    _check_sizes(network)
    copies = [module for module in network.auxiliary.modules() if isinstance(module, Called) and module.sources]
    if blocks is not None and copies:
        raise MethodError(
            f"{method.name} copies {type(copies[0].module).__name__}, which takes more tensors than the features (a "
            "mask, say), and runs blocks one by one, which does not have them at hand; leave out the bridge or the "
            "recomputation"
        )
    network._early_twins = {
        b: [twin for twin in network.twins_at(b) if twin.exchange == "before"] for b in range(1, count)
    }
    network.training = network.auxiliary.training = model.training
    network.rules = tuple(rule.bound(partition, cuts) for rule in method.rules)
    with untouched(network, training=True), torch.enable_grad():
        for rule in network.rules:
            rule.tried(network, example)
    return network


def separate_blocks(network: LocalNetwork) -> list[Block | RecomputedBlock]:
    """The blocks of a network as modules that can be called one by one and share its parameters.

    Raises:
        PartitionError: the model does not allow it, or they would not compute what its own forward does.
    """
    blocks = network._separate[0]
    return separate.separate_blocks(network.partition, network.cuts) if blocks is None else blocks.parts


def _check_model(model: nn.Module) -> None:
    """Raise `PartitionError` unless ``model`` is one that can be cut, and no wrapper that would be passed by."""
    if not isinstance(model, nn.Module):
        raise PartitionError(f"model is a {type(model).__name__}; localize(model, ...) takes a torch.nn.Module")
    kind = type(model).__name__
    if isinstance(model, LocalNetwork):
        raise PartitionError("model is what localize returned, heads included; pass network.model to cut it anew")
    check_wrapped(model)
    if not any(True for _ in model.parameters()):
        raise PartitionError(f"{kind} has no parameters, so no block of it can be trained")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise PartitionError(
                f"{name!r} of {kind} is made by its first forward: run the model once on the example before localize"
            )


def _check_sizes(network: LocalNetwork) -> None:
    """Warn of the largest auxiliary network if it has more parameters than the whole model."""
    whole = _size(network.model)
    size, key = max(((_size(auxiliary), key) for key, auxiliary in network.auxiliary.items()), default=(0, "0-0"))
    block = int(key.split("-")[1]) - 1
    if size <= whole:
        return
    auxiliary = network.auxiliary[key]
    assert isinstance(auxiliary, Auxiliary)
    named = ((type(term.head).__name__, head) for (term, _), head in zip(auxiliary.terms, auxiliary.heads, strict=True))
    parts = [*named, *([] if auxiliary.bridge is None else [("bridge", auxiliary.bridge)])]
    largest, name = max((_size(part), name) for name, part in parts)
    warnings.warn(
        f"the auxiliary network after block {block} has {size:,} parameters ({name}: {largest:,}), more "
        f"than the {whole:,} of the whole {type(network.model).__name__}; write a smaller head, such as "
        "dgl(task, head='linear') or head={'mlp': {'hidden': 128}}, leave out plug-ins that copy later units, or cut "
        "into fewer blocks",
        stacklevel=3,
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check_overwritten(method: Method, cuts: Sequence[Cut], patterns: Sequence[Sequence[Span]]) -> None:
    """Raise `PartitionError` if features that are read twice are overwritten in place by the next block."""
    for boundary, cut in enumerate(cuts, start=1):
        if not cut.overwritten:
            continue
        crossed = any(span.start < boundary < span.stop for pattern in patterns for span in pattern)
        if crossed or method.bridge is not None or method.rules:
            raise PartitionError(
                f"cuts: {cut.name!r} overwrites the features at this boundary in place, but {method.name} reads them a "
                "second time; cut after it, or build that layer with inplace=False"
            )
