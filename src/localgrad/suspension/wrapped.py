"""Wrappers that would be passed by, or that must not be suspended: refused, with the line to write instead."""

from __future__ import annotations

import torch
from torch import nn

from localgrad.errors import PartitionError
from localgrad.suspension.doors import is_compiled

_SHARD = "localgrad.distributed.data_parallel(network, mesh, shard=True)"
_INSTEAD = {
    "DistributedDataParallel": "localize(model.module, ...) and then localgrad.distributed.data_parallel(network, "
    "mesh): its own reduction waits for one backward pass through everything",
    "DataParallel": "localize(model.module, ...), and localgrad.distributed.data_parallel(network, mesh) with a "
    "process for each device",
    "FullyShardedDataParallel": f"localize the plain model, then fully_shard (FSDP2) its submodules, or {_SHARD}",
    "OptimizedModule": "localize(model._orig_mod, ...) and then network.compile_blocks(): a graph is never suspended",
}


def check_wrapped(model: nn.Module) -> None:
    """Raise `PartitionError` for a model that cannot be cut as it is wrapped."""
    kind = type(model).__name__
    if kind in _INSTEAD:
        raise PartitionError(f"model is wrapped in {kind}; write {_INSTEAD[kind]}")
    if any(_is_sharded(module) for module in model.modules()):
        raise PartitionError(
            "fully_shard was applied before the model was cut, and cut points are found by its whole parameters: "
            f"localize the plain model first, then fully_shard modules inside the blocks, or write {_SHARD}"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and not (name and _is_traced(module)):
            kind = module.original_name
            raise PartitionError(
                f"{f'{name!r} of the model' if name else 'model'} is a {kind} that torch.jit compiled, whose calls no "
                f"hook sees: localize with the {kind} that was given to torch.jit.script or torch.jit.trace in its "
                "place, and script or trace network.model after training"
            )


def check_network(network: nn.Module) -> None:
    """Raise `PartitionError` for a network that was sharded as a whole."""
    if _is_sharded(network):
        raise PartitionError(
            "fully_shard was applied to the network as a whole, which gathers every block at once: apply it to modules "
            f"inside the blocks, or write {_SHARD}"
        )


def check_holder(module: nn.Module) -> None:
    """Raise `PartitionError` for a module that holds a cut inside, but cannot be suspended there."""
    kind = type(module).__name__
    if kind in _INSTEAD:
        raise PartitionError(
            f"a cut lies inside a module wrapped in {kind}: take the wrapper off, or cut elsewhere. For a whole model "
            f"write {_INSTEAD[kind]}"
        )
    if is_compiled(module):
        raise PartitionError(
            f"a cut lies inside a {kind} whose compile() was called, and a graph is never suspended: compile modules "
            "between the cuts, as network.compile_blocks() does"
        )
    if _is_sharded(module):
        apart = {p for m in module.modules() if m is not module and _is_sharded(m) for p in m.parameters()}
        own = next((name for name, p in module.named_parameters() if p not in apart), None)
        if own is not None:
            raise PartitionError(
                f"a cut lies inside a {kind} on which fully_shard was called, which frees its own {own!r} after one "
                f"backward pass: apply it to modules that hold no cut, or write {_SHARD}"
            )


def _is_sharded(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _is_traced(module: nn.Module) -> bool:
    """Whether torch.jit.trace made it: called as any module, as long as the model itself is none."""
    return any(kind.__name__ == "TracedModule" for kind in type(module).__mro__)
