"""What normalisations and activation functions return, computed again in the backward pass instead of kept.

Autograd keeps the output of a BatchNorm-ReLU pair twice over: as the input of the BatchNorm, and as the input of the
convolution behind it. The second follows from the first by arithmetic that costs next to nothing beside a convolution.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Below that, the bookkeeping costs more time than the memory is worth.
LEAST_BYTES = 1 << 19

_aten = torch.ops.aten

# Their backward pass keeps their input, from which their output follows.
_NORMS = {_aten.native_batch_norm.default, _aten.cudnn_batch_norm.default, _aten.miopen_batch_norm.default}
_KEEP_INPUT = _NORMS | {
    getattr(_aten, name).default
    for name in (
        "native_layer_norm", "native_group_norm", "_fused_rms_norm",
        "gelu", "silu", "hardswish", "mish", "leaky_relu", "hardtanh", "hardsigmoid",
    )
    if hasattr(_aten, name)  # older versions of torch have no fused RMSNorm
}  # fmt: skip
# They keep their output or nothing at all: worth computing again only from what is itself computed again.
_FOLLOW = {
    _aten.relu.default: _aten.relu.default,
    _aten.relu_.default: _aten.relu.default,
    _aten.silu_.default: _aten.silu.default,
    _aten.hardswish_.default: _aten.hardswish.default,
    _aten.hardtanh_.default: _aten.hardtanh.default,
    _aten.leaky_relu_.default: _aten.leaky_relu.default,
    _aten._to_copy.default: _aten._to_copy.default,
    _aten.clone.default: _aten.clone.default,
}


class _Kept:
    """A tensor that stays in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the tensor itself may refer back to the node that saves it
        self.version = self.tensor._version

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            # Autograd checks this only for tensors that pass no hooks.
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was modified in place "
                f"(version {self.tensor._version}, expected {self.version}); build the layer with inplace=False"
            )
        return self.tensor


class _Result:
    """What one operation returned, as the way to compute it again.

    ``readers`` counts the tensors that autograd would have kept. The value is computed for the first of them and
    dropped after the last, so that the convolution behind a ReLU and the ReLU itself cost one computation.
    """

    def __init__(self, function: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        self.function, self.arguments, self.options = function, arguments, options
        self.readers = self.left = 0
        self.cached: Tensor | None = None

    def value(self) -> Tensor:
        if self.cached is not None:
            return self.cached
        arguments = [a.value() if isinstance(a, _Kept | _View) else a for a in self.arguments]
        result = self.function(*arguments, **self.options)
        value: Tensor = result if isinstance(result, Tensor) else result[0]
        if self.left > 0:
            self.cached = value
        return value

    def read(self) -> Tensor:
        value = self.value()
        self.left -= 1
        if self.left == 0:
            self.cached, self.left = None, self.readers  # once more, if the graph is kept
        return value


class _View:
    """A tensor that lies in the storage of a result."""

    def __init__(self, result: _Result, tensor: Tensor) -> None:
        self.result = result
        self.form = (tensor.size(), tensor.stride(), tensor.storage_offset())

    def value(self) -> Tensor:
        return self.result.value().as_strided(*self.form)

    def read(self) -> Tensor:
        return self.result.read().as_strided(*self.form)


class _Watch(TorchDispatchMode):
    """Notes how the results in each storage came about."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results: dict[int, tuple[weakref.ref[torch.UntypedStorage], _Result]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        noted = None
        if func in _KEEP_INPUT and _worth_it(args):
            noted = self._noted(func, args, kwargs)
        elif func in _FOLLOW and self._result_of(args[0]) is not None:
            noted = self._noted(_FOLLOW[func], args, kwargs)
        result = func(*args, **kwargs)
        if noted is not None:
            self._note(result if isinstance(result, Tensor) else result[0], noted)
        elif func._schema.is_mutable and self.results:
            for tensor in (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)):
                self._forget(tensor)
        return result

    def _noted(self, func: Any, args: Any, kwargs: Any) -> _Result:
        arguments = [self._source(a) if isinstance(a, Tensor) else a for a in args]
        if func in _NORMS and args[5]:
            arguments[3] = arguments[4] = None  # running statistics have moved already, and play no part in training
        return _Result(func, arguments, kwargs)

    def _source(self, tensor: Tensor) -> _Kept | _View:
        result = self._result_of(tensor)
        return _Kept(tensor) if result is None else _View(result, tensor)

    def _note(self, tensor: Tensor, result: _Result) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == tensor.numel() * tensor.element_size():
            self.results[storage._cdata] = (weakref.ref(storage), result)
        else:
            self._forget(tensor)

    def _forget(self, tensor: Tensor) -> None:
        if not hasattr(tensor, "__tensor_flatten__"):
            self.results.pop(tensor.untyped_storage()._cdata, None)

    def _result_of(self, tensor: Tensor) -> _Result | None:
        if not self.results or hasattr(tensor, "__tensor_flatten__"):
            return None
        storage = tensor.untyped_storage()
        known = self.results.get(storage._cdata)
        return known[1] if known is not None and known[0]() is storage else None

    def pack(self, tensor: Tensor) -> _Kept | _View:
        """What autograd keeps instead of ``tensor``."""
        source = self._source(tensor)
        if isinstance(source, _View):
            source.result.readers += 1
            source.result.left += 1
        return source


def _worth_it(arguments: Any) -> bool:
    kept = any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    return kept and arguments[0].nbytes >= LEAST_BYTES


def _unpack(source: _Kept | _View) -> Tensor:
    if isinstance(source, _Kept):
        return source.value()
    with torch.no_grad():
        return source.read()


@contextlib.contextmanager
def pointwise_recomputed() -> Iterator[None]:
    """Inside it, autograd keeps of a normalisation and its activation function the input alone.

    Outputs and gradients are those of the plain path bit for bit, since the same kernels run on the same numbers. The
    backward pass may come after the context has been left. Compiled regions are left to the compiler, which does the
    same by itself.
    """
    watch = _Watch()
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, _unpack), watch:
        try:
            yield
        finally:
            watch.results.clear()  # the graph refers to the hooks, and would keep the inputs of everything seen
