"""Successive gradient reconciliation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from localgrad.batches import tensors_in
from localgrad.errors import MethodError
from localgrad.losses import Reconciliation
from localgrad.method import Method, Network, Observer, Rule
from localgrad.methods.composition import plugin
from localgrad.network import LocalNetwork
from localgrad.partition.units import called_as
from localgrad.passes import Pass
from localgrad.task import Batch


@plugin
def sgr(base: Method, *, weight: float = 1.0) -> Method:
    """Neighbouring blocks agree about the features between them.

    ``L_k + weight * |dL_k / dh_{k-1} - stop_gradient(dL_{k-1} / dh_{k-1})| ** 2``: the gradient that a block's loss
    has at its input is drawn to the one that the block before had at the same features. Isolation stays; no parameters
    are added. The block and its head are differentiated twice.

    Args:
        base: a method whose spans are single blocks.
        weight: of the disagreement.

    Raises:
        MethodError: for wider spans, and at `localgrad.localize` for layers without a second derivative, such as fused
            attention.

    Example:
        >>> import localgrad
        >>> localgrad.methods.sgr(localgrad.methods.dgl(localgrad.tasks.classification(10)), weight=0.1).name
        'sgr(dgl)'

    Source: Yang et al., ICML 2024, arXiv:2406.05222, from its abstract and convergence statement; weight and distance
    of its experiments are not public.
    """
    base.require_heads("sgr")
    rule = _Reconcile(Reconciliation(weight))
    return replace(base, name=f"sgr({base.name})", rules=(*base.rules, rule))


@dataclass(frozen=True)
class _Reconcile(Rule):
    penalty: Reconciliation
    reason: ClassVar[str] = "compares the gradients of neighbouring blocks"
    joins: ClassVar[bool] = True

    def check(self, method: Method, num_blocks: int) -> None:
        beside = [span for pattern in method.spans.patterns(num_blocks) if len(pattern) > 1 for span in pattern]
        wide = next((span for span in beside if span.stop - span.start > 1), None)
        if wide is not None:
            raise MethodError(
                f"{method.name}: gradients are reconciled between blocks that train alone, but span {wide} of "
                f"{num_blocks} blocks covers several; use a base whose spans are single blocks, such as dgl"
            )

    def observe(self, network: Network, batch: Batch) -> Observer:
        alone = all(span.stop - span.start == 1 for span in network.spans(batch.step))
        return _Seam(self.penalty) if alone else Observer()

    def tried(self, network: Network, example: Any) -> None:
        """Raise `MethodError` unless the gradient of each block by its input can be differentiated again."""
        assert isinstance(network, LocalNetwork)
        with network.opened(()) as opened:
            one = Pass(network, opened, (), Batch(example, None, 0))
            seam = _Seam(self.penalty)
            one.observers, one.joins = [seam], True
            for block in one.blocks:
                one.run(block)
                output = next(t for t in tensors_in(one.forward.features))
                if seam.entry is None or one.boundary != block + 1 or not output.requires_grad:
                    continue
                with called_as(one.forward.arguments):
                    ends = [aux.bridged(output) for _, aux in network.auxiliaries_at(block + 1)] or [output]
                try:
                    (gradient,) = torch.autograd.grad(ends[0].float().square().sum(), seam.entry, create_graph=True)
                    torch.autograd.grad(gradient.sum(), seam.entry, allow_unused=True)
                except RuntimeError as error:
                    raise MethodError(
                        f"{network.method.name} differentiates block {block} twice, but it holds a layer without a "
                        f"second derivative ({next(iter(str(error).splitlines()), '')}). Fused attention is the usual "
                        "one: call timm.layers.set_fused_attn(False) before timm builds the model, or build and train "
                        "it under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
                    ) from error


class _Seam(Observer):
    """Where two blocks meet whose gradients are to agree: that of the later one's loss, and what the earlier one had.

    Gives the later block an input with gradient, and takes that gradient before the caller's backward pass does.
    """

    joins = True

    def __init__(self, penalty: Reconciliation) -> None:
        self.penalty = penalty
        self.entry: Any = None  # not the tensor: it is about to be swapped with the one that the forward holds
        self.before: Tensor | None = None
        self.passed = False

    def enter(self, features: Tensor) -> Tensor:
        # No leaf: hooks that count FLOPs by module do not stand torch.autograd.grad with respect to one.
        entry = features.requires_grad_().view_as(features)
        self.entry = torch.autograd.graph.get_gradient_edge(entry)
        return entry

    def total(self, boundary: int, total: Tensor, losses: Mapping[int, Tensor], features: Any, batch: Batch) -> Tensor:
        if not torch.is_grad_enabled():
            return total
        output = next((t for t in tensors_in(features) if t.requires_grad), None)
        if output is None:  # all before it is frozen, so there is nothing to agree about
            self.entry, self.before, self.passed = None, None, True
            return total
        if self.entry is None or self.before is None:
            (gradient,) = torch.autograd.grad(total, output, retain_graph=True)
        else:
            gradient, ours = torch.autograd.grad(total, (output, self.entry), create_graph=True)
            total = total + self.penalty(ours, self.before)
        self.entry, self.before, self.passed = None, gradient.detach(), False
        output.register_hook(self._note)
        return total

    def reached(self) -> bool | None:
        return self.passed

    def _note(self, _: Tensor) -> None:
        self.passed = True
