"""Which rank trains which tensor: what others train takes no memory here, until the network is gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localgrad.distributed.agreement import explained
from localgrad.network import LocalNetwork

Owners = dict[Tensor, int]


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def tensors_by_rank(network: LocalNetwork, blocks: Sequence[nn.Module], rank_of: Mapping[int, int]) -> Owners:
    """Every parameter and buffer of blocks and auxiliary networks, with the rank that trains it.

    Args:
        network: whose auxiliary networks are trained with the block before them.
        blocks: all of them, each with what it reads.
        rank_of: the rank of each block.
    """
    found: Owners = {}
    for block, rank in rank_of.items():
        modules = [blocks[block], *(auxiliary for _, auxiliary in network.auxiliaries_at(block + 1))]
        for tensor in (t for module in modules for t in named_tensors(module).values()):
            found.setdefault(tensor, rank)
    return found


class Custody:
    """What this rank has given up, and how it gets it back.

    Tensors of other ranks become NaN, take no memory and need no gradient, but for those that twins here follow.

    Args:
        group: the ranks along the blocks, in order.
        owners: the rank that trains each tensor.
        followed: tensors here that hold weights of other ranks, by rank.
    """

    @torch.no_grad()
    def __init__(self, group: dist.ProcessGroup, owners: Owners, followed: Mapping[int, Sequence[Tensor]]) -> None:
        self.group, self.owners = group, owners
        self._given_up: dict[Tensor, tuple[tuple[int, ...], bool]] = {}
        kept = {id(tensor) for tensors in followed.values() for tensor in tensors}
        for tensor, rank in owners.items():
            if rank == group.rank():
                continue
            self._given_up[tensor] = tensor.stride(), tensor.requires_grad
            tensor.requires_grad_(False)
            if id(tensor) not in kept:
                nothing = float("nan") if tensor.is_floating_point() else 0
                tensor.data = torch.full((), nothing, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)

    @torch.no_grad()
    def gather(self) -> None:
        """Give every rank all tensors as their owners have them."""
        for tensor, (strides, trained) in self._given_up.items():
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                tensor.data = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
            tensor.requires_grad_(trained)
        with explained("gathering the network"):
            for tensor, rank in self.owners.items():
                data = tensor.detach().contiguous()
                dist.broadcast(data, dist.get_global_rank(self.group, rank), group=self.group)
                tensor.detach().copy_(data)
