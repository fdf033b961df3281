"""Transport-regularised greedy learning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from localgrad.errors import MethodError
from localgrad.losses.precision import widened
from localgrad.method import Method, Network, Observer, Rule
from localgrad.methods.composition import plugin
from localgrad.partition import Cut, Partition
from localgrad.partition.residual import residual_branches
from localgrad.task import Batch


@plugin
def trgl(base: Method, *, tau: float = 10.0) -> Method:
    """Blocks move features as little as they can: the energy of their residual branches is added to their loss.

    ``L_k + 1 / (2 tau_k) * sum over the residual branches r of block k of mean(r ** 2)``, the last block included;
    ``tau_k = tau`` in the first half of the blocks and ``2 tau`` in the second.

    Args:
        base: a local method.
        tau: larger is freer; the paper's values run from 1 to 1e6 with the network.

    Raises:
        MethodError: for a tau that is not positive, and at `localgrad.localize` for a block without residual branches
            of a model that has none, or whose branches no module returns.

    Example:
        >>> import localgrad
        >>> localgrad.methods.trgl(localgrad.methods.dgl(localgrad.tasks.classification(10)), tau=100.0).name
        'trgl(dgl)'

    Source: Karkar et al., Module-wise Training of Neural Networks via the Minimizing Movement Scheme, NeurIPS 2023,
    arXiv:2309.17357.
    Differs: any base; residual branches are found in autograd's graph instead of being written into it. On guided steps
    of `localgrad.methods.pgl` only the last block's energy counts.
    """
    base.require_heads("trgl")
    if not tau > 0:
        raise MethodError(f"tau={tau}; it must be positive")
    return replace(base, name=f"trgl({base.name})", rules=(*base.rules, _Transport(tau)))


@dataclass(frozen=True)
class _Transport(Rule):
    """``branches`` are the modules of each block whose results are residual branches, and half of 1 / tau there."""

    tau: float
    branches: tuple[tuple[tuple[str, ...], float], ...] = ()
    overwritten: dict[nn.Module, bool] = field(default_factory=dict, compare=False, repr=False)
    travels: ClassVar[bool] = True

    def bound(self, partition: Partition, cuts: Sequence[Cut]) -> Rule:
        branches = residual_branches(partition)
        if not branches:
            raise MethodError(f"trgl: {type(partition.model).__name__} has no residual branches, so nothing to add")
        edges = [0, *(cut.position for cut in cuts), 1 << 62]
        found = []
        for block in range(len(cuts) + 1):
            inside = dict.fromkeys(path for at, path in branches if edges[block] <= at < edges[block + 1])
            tau = self.tau * (2.0 if 2 * block >= len(cuts) + 1 else 1.0)
            found.append((tuple(inside), 0.5 / tau))
        return replace(self, branches=tuple(found), overwritten={})

    def observe(self, network: Network, batch: Batch) -> _Energies:
        return _Energies(network.running, self)


class _Energies(Observer):
    """Measures residual branches while their block runs."""

    def __init__(self, root: nn.Module, rule: _Transport) -> None:
        self.root, self.branches, self.overwritten = root, rule.branches, rule.overwritten
        self.found: list[Tensor] = []
        self.seen: list[tuple[nn.Module, Tensor, int]] = []

    @contextlib.contextmanager
    def during(self, block: int) -> Iterator[None]:
        self.found = []
        names, _ = self.branches[block]
        hooks = [self.root.get_submodule(name).register_forward_hook(self._measure) for name in names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, branch, version in self.seen:
                self.overwritten[module] = branch._version != version
            self.seen = []

    def _measure(self, module: nn.Module, _: Any, branch: Tensor) -> None:
        # ``out += x`` is an ordinary addition to autograd: whether a branch is overwritten shows when it runs.
        kept = widened(branch.clone() if self.overwritten.get(module, True) else branch)
        self.seen.append((module, branch, branch._version))
        # A norm keeps no squares for the backward pass.
        self.found.append(torch.linalg.vector_norm(kept).square() / kept.numel())

    def measured(self, block: int) -> Tensor | None:
        found, self.found = self.found, []
        return self.branches[block][1] * torch.stack(found).sum() if found and torch.is_grad_enabled() else None
