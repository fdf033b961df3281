"""Where the gradient stops and goes on: the one place that cuts features from the graph they came from.

A boundary after the forward was suspended there, a span ending at it (left) and a span going on across it (right)::

    block k                     head            block k                     block k + 1
    ... -> made ..X.. features -> loss          ... -> made ..X.. features -> ...
            ^            |                              ^            |
         _Inject      _Capture                       _Inject      _Capture
            ^            |                              ^            |
            +- gradient -+                              +- gradient -+
      later, in a backward pass of its own        when the widest span that starts here has ended

``X``: no graph goes on. What a block has made, everybody who holds it (the frames of the model's forward, a list of
skips, an attribute) finds replaced in place: detached or, inside a span, such that its gradient is caught.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from localgrad.errors import PartitionError

Gradients = list[Tensor | None]


def becomes(tensor: Tensor, value: Tensor) -> None:
    """Everybody who holds ``tensor`` holds ``value`` from now on; no version counter moves, views are tensors too."""
    try:
        torch._C._swap_tensor_impl(tensor, value)
        if isinstance(value, Released):
            tensor.__class__, value.__class__ = Released, type(tensor)  # type: ignore[assignment]
    except RuntimeError as error:  # `retain_grad` has left a weak reference to it in C++
        if value.requires_grad or tensor._is_view() or isinstance(value, Released):
            raise PartitionError(
                f"a tensor of shape {tuple(tensor.shape)} that crosses a boundary is held by autograd "
                "(by retain_grad(), most likely), so it cannot be cut from its graph: read it in a hook inside the "
                "block, or cut elsewhere"
            ) from error
        tensor.detach_()


class Released(Tensor):
    """The form of a tensor without its data. Swapped with a tensor, every operation on that one is an error.

    Shape, type and device stay what they were. (Many operations take a tensor on the meta device in silence.)
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, tensor: Tensor) -> Released:
        make: Any = Tensor._make_wrapper_subclass
        return make(cls, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError("the data of a tensor was let go of")


class _Inject(torch.autograd.Function):
    """A scalar whose backward pass sends the gradients in ``box`` into ``outputs``.

    Handing them to ``torch.autograd.backward`` would keep them, and the outputs, alive for as long as it runs.
    """

    @staticmethod
    def forward(ctx: Any, box: Gradients, *outputs: Tensor) -> Tensor:
        ctx.box = box
        return torch.empty((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None, *ctx.box)
        ctx.box.clear()
        return gradients


# What has no graph of its own gets one by it; no gradient reaches it.
_ANCHOR = torch.zeros((), requires_grad=True)


class _Capture(torch.autograd.Function):
    """The features in ``held``; their gradient is added to ``gradients[index]`` as it is, and goes no further.

    They come in a tuple, where autograd does not look for the graph that they have.

    A leaf's ``.grad`` would do but for its strides: autograd may copy a gradient to lay it out like the leaf, after
    which the blocks before it sum in another order than end-to-end training does.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, held: tuple[Tensor], gradients: Gradients, index: int) -> Tensor:
        ctx.gradients, ctx.index = gradients, index
        return held[0].detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        known = ctx.gradients[ctx.index]
        ctx.gradients[ctx.index] = gradient if known is None else known + gradient
        return None, None, None, None


class _Stop(torch.autograd.Function):
    """The features in ``held``, differentiable; their gradient goes nowhere.

    Where a cut lies inside a region that activation checkpointing runs again, the features must look as if they were
    not cut: a layer saves other tensors when its input carries no gradient.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, held: tuple[Tensor]) -> Tensor:
        return held[0].detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def stopped(tensor: Tensor, *, differentiable: bool = False) -> Tensor:
    """``tensor`` as the next block may read it when no span crosses."""
    with torch.enable_grad():
        return _Stop.apply(_ANCHOR, (tensor,)) if differentiable else tensor.detach()


class BlockGraph:
    """The autograd graph of a finished block: the way into it, and the gradients of what it made.

    Args:
        made: what the block made and somebody still holds, tensors with a graph.
        first: the block; or the first of several, where the forward did not reach the cuts between them.
    """

    def __init__(self, made: Sequence[Tensor], first: int) -> None:
        self.first = first
        self._box: Gradients = []
        self.gradients: Gradients = [None] * len(made)
        self.crossing: dict[int, GradientEdge] = {}
        self.root: Tensor | None = _Inject.apply(self._box, *made) if made else None

    def captured(self, tensor: Tensor, slot: int) -> Tensor:
        """``tensor`` without its graph, such that a backward pass from it leaves its gradient here."""
        with torch.enable_grad():
            return _Capture.apply(_ANCHOR, (tensor,), self.gradients, slot)

    def passed_on(self, tensor: Tensor, slot: int) -> Tensor:
        """``tensor`` as `captured`, for the blocks behind."""
        value = self.captured(tensor, slot)
        assert value.grad_fn is not None
        self.crossing[slot] = GradientEdge(value.grad_fn, 0)
        return value

    def known(self) -> list[tuple[GradientEdge, Tensor]]:
        """The gradients left here by the blocks behind, and where they enter another backward pass; forgotten here.

        Autograd adds up what reaches a tensor from its last reader to its first. A block that reads it too has to begin
        with what later blocks left, or the sum is rounded in another order than in one backward pass.
        """
        found = [(edge, self.gradients[slot]) for slot, edge in self.crossing.items()]
        for slot in self.crossing:
            self.gradients[slot] = None
        return [(edge, gradient) for edge, gradient in found if gradient is not None]

    def take_gradients(self) -> Gradients:
        """The gradients left here, which are forgotten."""
        gradients = list(self.gradients)
        self.gradients[:] = [None] * len(gradients)
        return gradients

    def backward(self, gradients: Gradients, earlier: Sequence[BlockGraph], again: bool) -> None:
        """Send gradients of what the block made through it; keep its graph only if it is needed ``again``.

        ``earlier`` are the graphs of the span before it, from which the block may have read.
        """
        self._box[:] = gradients
        gradients.clear()
        root = self.root
        if not again:
            self.root = None
        if root is not None and any(gradient is not None for gradient in self._box):
            known = [pair for graph in earlier for pair in graph.known()]
            roots: Any = [*(edge for edge, _ in known), root]
            # The root stands for a gradient of itself, which nobody reads.
            torch.autograd.backward(roots, [*(gradient for _, gradient in known), root], retain_graph=again)
