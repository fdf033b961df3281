"""Transport-regularised greedy learning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.errors import MethodError
from localgrad.losses.precision import widened
from localgrad.method import Method
from localgrad.partition import Chain, Cut, Partition
from localgrad.partition.residual import residual_branches


def trgl(base: Method, *, tau: float = 10.0, growing: bool = True) -> Method:
    """Blocks move features as little as they can: the energy of their residual branches is added to their loss.

    ``L_k + 1 / (2 tau_k) * sum over the residual branches r of block k of mean(r ** 2)``, the last block included;
    ``tau_k = tau`` in the first half of the blocks and ``2 tau`` in the second.

    Args:
        base: a local method.
        tau: larger is freer; the paper's values run from 1 to 1e6 with the network.
        growing: whether the second half has twice the tau.

    Raises:
        MethodError: for a tau that is not positive, and at `localgrad.localize` for a block without residual branches
            of a model that has none, or whose branches no module returns.

    Example:
        >>> import localgrad
        >>> localgrad.methods.trgl(localgrad.methods.dgl(localgrad.tasks.classification(10)), tau=100.0).name
        'trgl(dgl)'

    Source: Karkar et al., Module-wise Training of Neural Networks via the Minimizing Movement Scheme, NeurIPS 2023,
    arXiv:2309.17357.
    Differs: any base; residual branches are found in the traced model instead of being written into it. On guided steps
    of `localgrad.methods.pgl` only the last block's energy counts.
    """
    base.require_heads("trgl")
    if not tau > 0:
        raise MethodError(f"tau={tau}; it must be positive")
    return replace(base, name=f"trgl({base.name})", probe=_Transport(tau, growing))


@dataclass(frozen=True)
class _Transport:
    tau: float
    growing: bool

    def __call__(self, partition: Partition | Chain, cuts: tuple[Cut, ...], block: int) -> _Energy | None:
        if isinstance(partition, Chain):
            raise MethodError("trgl finds residual branches by tracing; give num_blocks= or cuts= instead of modules=")
        branches = residual_branches(partition)
        if not branches:
            raise MethodError(f"trgl: {type(partition.model).__name__} has no residual branches, so nothing to add")
        edges = [0, *(cut.position for cut in cuts), len(partition.traced.nodes)]
        inside = dict.fromkeys(path for at, path in branches if edges[block] <= at < edges[block + 1])
        tau = self.tau * (2.0 if self.growing and 2 * block >= len(cuts) + 1 else 1.0)
        return _Energy([partition.modules[path] for path in inside], 0.5 / tau) if inside else None


class _Energy:
    """A `localgrad.method.Probe`."""

    def __init__(self, branches: list[nn.Module], weight: float) -> None:
        self.branches, self.weight = branches, weight
        self.overwritten: dict[nn.Module, bool] = {}

    def __call__(self, block: nn.Module, *values: Any) -> tuple[tuple[Any, ...], Tensor]:
        energies: list[Tensor] = []
        seen: list[tuple[nn.Module, Tensor, int]] = []

        def measure(module: nn.Module, _: Any, branch: Tensor) -> None:
            # ``out += x`` is an ordinary addition to torch.fx, so whether a branch is overwritten shows when it runs.
            kept = widened(branch.clone() if self.overwritten.get(module, True) else branch)
            # A norm keeps no squares for the backward pass.
            energies.append(torch.linalg.vector_norm(kept).square() / kept.numel())
            seen.append((module, branch, branch._version))

        hooks = [module.register_forward_hook(measure) for module in self.branches]
        try:
            outputs = block(*values)
        finally:
            for hook in hooks:
                hook.remove()
        for module, branch, version in seen:
            self.overwritten[module] = branch._version != version
        return outputs, self.weight * torch.stack(energies).sum()
