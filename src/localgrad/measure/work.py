"""What a step does and what a device does in a second: seconds from FLOPs and bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from localgrad.errors import ConfigError
from localgrad.measure.timing import in_turns

aten = torch.ops.aten
# Memory is only allocated, a result already there is handed on, or a fake tensor is asked where it is.
_FREE = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view, aten._reshape_alias,
    torch.ops.prim.device,
}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Args:
        flops: of convolutions and matrix products, 2 per multiply-add.
        bytes: read and written by everything else.
        start: seconds that starting an operation takes, whatever its size; 0 for a GPU, which gets the next operation
            while one runs.
        link: bytes copied between host and device; that of 16 lanes of PCI Express 4 where it is not known.
    """

    flops: float
    bytes: float
    start: float = 0.0
    link: float = 25e9

    def __post_init__(self) -> None:
        if not (self.flops > 0 and self.bytes > 0 and self.start >= 0 and self.link > 0):
            raise ConfigError(
                f"rates: {self.flops} FLOP/s, {self.bytes} bytes/s, {self.start} s, {self.link} bytes/s of the link; "
                "start must be at least 0, the others above 0. Write for instance Rates(flops=30e12, bytes=500e9)"
            )


def measure_rates(device: torch.device | None = None, dtype: torch.dtype = torch.float32, rounds: int = 5) -> Rates:
    """What this device does: a 3x3 convolution, and additions that make new tensors. Takes about a second."""
    device = device or torch.device("cpu")
    large = device.type == "cuda"
    images, side = (128, 56) if large else (4, 56)
    x = torch.randn(images, 64, side, side, device=device, dtype=dtype)
    weight = torch.randn(64, 64, 3, 3, device=device, dtype=dtype)
    values = torch.randn(2**28 if large else 2**22, device=device, dtype=dtype)
    flops = 2 * 9 * 64 * x.numel()

    def seconds(work: Callable[[], object]) -> float:
        return statistics.median(in_turns([work], rounds, device, warm=2)[0])

    with torch.no_grad():
        convolution = seconds(lambda: nn.functional.conv2d(x, weight, padding=1))
        addition = seconds(lambda: values + 1)
    one = torch.ones(1, requires_grad=True)
    start = 0.0 if device.type == "cuda" else seconds(lambda: [one + 1 for _ in range(1000)]) / 1000
    bandwidth = 2 * values.numel() * values.element_size() / addition
    return Rates(flops / convolution, bandwidth, start, measure_link(device, rounds))


def measure_link(device: torch.device, rounds: int = 5) -> float:
    """Bytes a second from pinned memory of the host to a device; on a CPU from one place of its memory to another."""
    host = torch.empty(2**28 if device.type == "cuda" else 2**24, dtype=torch.uint8)
    there = torch.empty_like(host, device=device)
    if device.type == "cuda":
        host = host.pin_memory()
    seconds = in_turns([lambda: there.copy_(host, non_blocking=True)], rounds, device, warm=2)[0]
    return host.numel() / statistics.median(seconds)


class Work(TorchDispatchMode):
    """Counts what a step does: FLOPs, and the seconds they and the bytes read and written would take.

    An operation takes as long as the slower of its arithmetic and its traffic, and what starting one takes. Views and
    memory that is only allocated take nothing.

    Args:
        rates: of the device.

    Attributes:
        flops: of convolutions, matrix products and attention, 2 per multiply-add.
        seconds: predicted.
    """

    def __init__(self, rates: Rates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rates = rates
        self.flops = 0
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not is_free(func):
            flops = _flops(func, args, kwargs, result)
            traffic = sum(_bytes(value) for value in tree_leaves((args, kwargs, result)))
            self.flops += flops
            self.seconds += self.rates.start + max(flops / self.rates.flops, traffic / self.rates.bytes)
        return result


def is_free(operation: Any) -> bool:
    """Whether an operation of torch computes nothing: a view, or memory that is only allocated."""
    return operation.is_view or operation._overloadpacket in _FREE


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    name = func._overloadpacket
    if name is aten._scaled_dot_product_flash_attention_for_cpu:  # torch has formulas for the others
        return int(sdpa_flop_count(*(t.shape for t in args[:3])))
    if name is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(t.shape for t in args[:4])))
    formula = flop_registry.get(name)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def _bytes(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())  # expanded ones are small
