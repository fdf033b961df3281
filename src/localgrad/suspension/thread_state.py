"""What torch keeps per thread, set aside while a forward is suspended and put back when it goes on.

A forward may be suspended inside ``torch.autocast``, ``torch.no_grad``, ``sdpa_kernel``, ``with torch.device(...)``, a
dispatch mode or saved-tensor hooks. None of that may reach the caller's heads, losses and backward passes, and several
suspended forwards need not leave those contexts in the order in which they entered them. So nothing is entered or left
at a switch: values are read and written, and what lies on a stack above the caller's height is lifted off.

The names of torch used here are private or little used; ``tests/unit/test_thread_state.py`` holds each of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch._C import _autograd
from torch.utils import _python_dispatch

_DEVICES = ("cpu", *(d for d in ("cuda", "mps", "xpu") if torch._C._is_autocast_available(d)))
_KERNELS = tuple(
    name
    for name in ("flash", "math", "mem_efficient", "cudnn", "overrideable")
    if hasattr(torch._C, f"_set_sdp_use_{name}")  # which there are depends on the version
)


# What torch.compile asks instead of the stack of dispatch modes; which there are depends on the version.
_FLAGS = tuple(
    name
    for name in (
        "_is_in_torch_dispatch_mode",
        "_is_in_non_infra_torch_dispatch_mode",
        "_is_in_any_mode_without_ignore_compile_internals",
    )
    if hasattr(_python_dispatch, name)
)


class Values(NamedTuple):
    """Everything that is a value."""

    grad: bool
    cache: bool
    dtype: torch.dtype
    autocast: tuple[tuple[bool, torch.dtype], ...]
    kernels: tuple[bool, ...]
    priority: list[int]
    cuda: tuple[int, torch.cuda.Stream] | None
    flags: tuple[bool, ...]


class Heights(NamedTuple):
    """How much lies on each stack: function modes, dispatch modes, autocast contexts, saved-tensor hooks (the top)."""

    functions: int
    modes: int
    autocast: int
    hooks: Any


class Lifted(NamedTuple):
    """What was taken off the stacks, the top first."""

    functions: list[Any]
    modes: list[Any]
    autocast: int
    hooks: list[Any]


def values() -> Values:
    """Read the values."""
    cuda = (torch.cuda.current_device(), torch.cuda.current_stream()) if torch.cuda.is_initialized() else None
    return Values(
        torch.is_grad_enabled(),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES),
        tuple(getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in _KERNELS),
        torch._C._get_sdp_priority_order(),
        cuda,
        tuple(getattr(_python_dispatch, name) for name in _FLAGS),
    )


def set_values(state: Values) -> None:
    """Write the values."""
    torch._C._set_grad_enabled(state.grad)
    torch.set_autocast_cache_enabled(state.cache)
    if state.dtype != torch.get_default_dtype():
        torch.set_default_dtype(state.dtype)
    for device, (enabled, dtype) in zip(_DEVICES, state.autocast, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    for name, enabled in zip(_KERNELS, state.kernels, strict=True):
        getattr(torch._C, f"_set_sdp_use_{name}")(enabled)
    if state.priority != torch._C._get_sdp_priority_order():
        torch._C._set_sdp_priority_order(state.priority)
    for name, flag in zip(_FLAGS, state.flags, strict=True):
        setattr(_python_dispatch, name, flag)
    if state.cuda is not None:
        torch.cuda.set_device(state.cuda[0])
        torch.cuda.set_stream(state.cuda[1])


def _nesting() -> int:
    """Depth of autocast contexts; whoever leaves the outermost one clears autocast's cache."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def _top_hooks() -> Any:
    return _autograd._top_saved_tensors_default_hooks(True)


def heights() -> Heights:
    """Measure the stacks."""
    return Heights(torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), _nesting(), _top_hooks())


def lift_off(base: Heights) -> Lifted:
    """Take off what lies above ``base``.

    Autocast's cache is cleared: kept, it would give a tied weight its old value.
    """
    functions = [
        torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack() - base.functions)
    ]
    modes = [torch._C._pop_torch_dispatch_stack(None) for _ in range(torch._C._len_torch_dispatch_stack() - base.modes)]
    depth = _nesting() - base.autocast
    for _ in range(depth):
        torch.autocast_decrement_nesting()
    hooks = []
    while (top := _top_hooks()) is not None and top != base.hooks:
        hooks.append(top)
        _autograd._pop_saved_tensors_default_hooks()
    torch.clear_autocast_cache()
    return Lifted(functions, modes, depth, hooks)


def put_on(own: Lifted) -> None:
    """The inverse, on top of whatever the caller has stacked by now."""
    torch.clear_autocast_cache()
    for mode in reversed(own.functions):
        torch._C._push_on_torch_function_stack(mode)
    for mode in reversed(own.modes):
        torch._C._push_on_torch_dispatch_stack(mode)
    for _ in range(own.autocast):
        torch.autocast_increment_nesting()
    for pack, unpack in reversed(own.hooks):
        _autograd._push_saved_tensors_default_hooks(pack, unpack)
