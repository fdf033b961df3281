"""A whole training step as one CUDA graph: no Python and no kernel launches between its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


def record_on_cuda(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Capture ``work`` without running it: the call that replays it, and what it returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


class Captured:
    """``step(*tensors)``, captured at its fourth call and replayed from then on; each call is one step.

    The first calls run as they are, so that libraries choose their kernels and optimizers make their state. Tensors of
    another shape or type than the first ones (the last batch of an epoch, say) always run as they are. What the step
    returns is overwritten by the next one. Elsewhere than on CUDA a warning says so, and every call runs as it is.

    A step that is to be captured must do the same work whatever its number, read nothing back (no ``.item()``), keep
    learning rates as tensors on the device, and end with ``zero_grad(set_to_none=True)``. So: not `keyed_randomness`,
    which seeds generators, and no schedule of spans or terms; dropout draws from torch's own generator.

    Args:
        step: the work on the device: losses, backward passes, optimizer, `localgrad.exchange`.
        warm_up: calls before the capture.
        again: called after each replay, for what the step does on the host besides (counting, say).
        record: how work is captured; only tests need another one.

    Example:
        >>> import torch
        >>> from localgrad.train.capture import Captured
        >>> step = Captured(lambda x: x + 1, record=lambda work: (lambda: None, work()))
        >>> step(torch.zeros(1)).item()
        1.0
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        warm_up: int = 3,
        again: Callable[[], None] | None = None,
        record: Record | None = None,
    ) -> None:
        self.step, self.warm_up, self.again = step, warm_up, again
        self.calls = 0
        self.static: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None
        self.result: Any = None
        self.record = record

    def __call__(self, *tensors: Tensor) -> Any:
        """One step."""
        if not self.static:
            self.static = tuple(tensor.clone() for tensor in tensors)
            if self.record is None and tensors[0].device.type == "cuda":
                self.record = record_on_cuda
            elif self.record is None:
                warnings.warn(
                    f"a step is captured as a CUDA graph on a CUDA device only; on the {tensors[0].device} it runs as "
                    "it is",
                    stacklevel=2,
                )
        if self.record is None:
            return self.step(*tensors)
        if [_form(tensor) for tensor in tensors] != [_form(tensor) for tensor in self.static]:
            return self.step(*tensors)
        self.calls += 1
        if self.calls <= self.warm_up:
            return self._warm(*tensors)
        for static, tensor in zip(self.static, tensors, strict=True):
            static.copy_(tensor)
        if self.replay is None:
            self.replay, self.result = self.record(lambda: self.step(*self.static))
            self.replay()
            return self.result
        self.replay()
        if self.again is not None:
            self.again()
        return self.result

    def _warm(self, *tensors: Tensor) -> Any:
        """Run as it is, on another stream than the default one, as captures want it."""
        if tensors[0].device.type != "cuda":
            return self.step(*tensors)
        stream = torch.cuda.Stream(tensors[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.step(*tensors)
        torch.cuda.current_stream().wait_stream(stream)
        return result


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
