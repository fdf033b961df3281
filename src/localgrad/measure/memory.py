"""Exact bytes of live tensors, on any device and without one: counted op by op, not read from an allocator.

What is counted is what the program holds: the storages that ops return. Workspaces inside a kernel, rounding by a
caching allocator and everything inside a compiled region are invisible here; ``torch.cuda.max_memory_allocated`` has
those.
"""

from __future__ import annotations

import gc
import weakref
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


@dataclass(frozen=True)
class Memory:
    """What `measure` saw, in bytes above what was live before the step.

    Attributes:
        peak_activations: the most that was live at once, leaving out gradients of the parameters.
        peak_total: the most that was live at once.
        timeline: (live, gradients) after every op, in order; empty unless asked for.
    """

    peak_activations: int
    peak_total: int
    timeline: tuple[tuple[int, int], ...] = ()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active, for as long as they live; holds none of them.

    A storage counts once, however many views, detached aliases or saved tensors share it, from the op that returns it
    until it is freed, also during backward and after leaving the context. Storages that existed before do not count
    (only what they grow by). A raw storage passed to ``Tensor.set_`` is taken to have existed before.

    A storage that becomes the ``grad`` of one of ``parameters`` counts as gradient from the op that made it until it
    is freed; an addend that autograd adds to an existing ``grad`` is never one.

    Args:
        parameters: whose gradients to tell apart.

    Attributes:
        current: bytes live now.
        peak: the largest ``current`` after any op.
        gradients: the bytes of ``current`` that are gradients of the parameters.

    Example:
        >>> import torch
        >>> from localgrad.measure.memory import LiveBytes
        >>> with LiveBytes() as tracker:
        ...     x = torch.zeros(10) + 1  # 2 tensors of 40 bytes, of which one is freed at once
        >>> tracker.peak, tracker.current
        (80, 40)
    """

    def __init__(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self.gradients = 0
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._hooks: list[Any] = []
        self._seen: dict[int, _Seen] = {}
        self._live = array("q")  # after every op
        # How gradient bytes change from one op to the next, by the index of the op. Kept apart from `_live` because
        # only later is it known that a storage was a gradient from its first op on.
        self._gradient_changes: defaultdict[int, int] = defaultdict(int)
        # One callback for all storages, which does not keep the tracker alive.
        myself = weakref.ref(self)

        def forget(seen: Any) -> None:
            tracker = myself()
            if tracker is not None:
                tracker._forget(seen)

        self._on_death = forget

    @property
    def peak_activations(self) -> int:
        """The largest number of live bytes after any op, leaving out gradients of the parameters."""
        return max((live - gradients for live, gradients in self._ops()), default=0)

    @property
    def timeline(self) -> list[tuple[int, int]]:
        """(live bytes, the gradient bytes among them) after every op so far."""
        return list(self._ops())

    def __enter__(self) -> LiveBytes:
        self._hooks = [p.register_post_accumulate_grad_hook(self._mark_gradient) for p in self._parameters]
        for p, hook in zip(self._parameters, self._hooks, strict=True):
            hooks: dict[int, Any] = p._post_accumulate_grad_hooks
            for other in [key for key in hooks if key != hook.id]:
                hooks[other] = hooks.pop(other)  # runs later, as it may step and free the gradient
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a wrapper's own handler runs first; what it does inside comes back here
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # how torch.tensor(...) announces what it just made
            self._see(args, new=False)
            for value in kwargs.values():
                self._see(value, new=False)
        result = func(*args, **kwargs)
        self._see(result, new=True)
        if self.current > self.peak:
            self.peak = self.current
        self._live.append(self.current)
        return result

    def _see(self, value: Any, new: bool) -> None:
        if isinstance(value, torch.Tensor):
            for storage in _storages(value):
                self._see_storage(storage, new)
        elif isinstance(value, list | tuple):
            for item in value:
                self._see(item, new)
        elif isinstance(value, torch.UntypedStorage):
            self._see_storage(value, new)

    def _see_storage(self, storage: torch.UntypedStorage, new: bool) -> _Seen:
        key, size = storage._cdata, storage.nbytes()
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = _Seen(storage, self._on_death)
            seen.key, seen.before, seen.counted = key, 0 if new else size, 0
            seen.first_op, seen.is_gradient = len(self._live), False
        # Every time, because Storage.resize_ is no op and is seen only here.
        self._set(seen, max(0, size - seen.before))
        return seen

    def _set(self, seen: _Seen, counted: int) -> None:
        # A garbage collection or another autograd thread may run `_forget` between any two lines, but never inside
        # one of these additions.
        change = counted - seen.counted
        if change:
            seen.counted = counted
            self.current += change
            if seen.is_gradient:
                self.gradients += change
                self._gradient_changes[len(self._live)] += change

    def _forget(self, seen: _Seen) -> None:
        # By identity: a new storage may already be at the same address.
        if self._seen.get(seen.key) is seen:
            del self._seen[seen.key]
        self._set(seen, 0)

    def _mark_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is None:
            return
        for storage in _storages(parameter.grad):
            seen = self._see_storage(storage, new=False)
            if not seen.is_gradient:
                seen.is_gradient = True
                self.gradients += seen.counted
                self._gradient_changes[seen.first_op] += seen.counted

    def _ops(self) -> Iterator[tuple[int, int]]:
        gradients = 0
        for index, live in enumerate(self._live):
            gradients += self._gradient_changes.get(index, 0)
            yield live, gradients


class _Seen(weakref.ref[torch.UntypedStorage]):
    """A storage and what of it counts. Torch keeps a storage's Python object for as long as the storage lives."""

    __slots__ = ("before", "counted", "first_op", "is_gradient", "key")
    key: int
    before: int  # bytes, if it existed before the tracker saw it
    counted: int  # bytes
    first_op: int
    is_gradient: bool


def _storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """The storages behind ``tensor``: several for wrappers and sparse tensors, none where there is no access."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [storage for name in names for storage in _storages(getattr(tensor, name))]
    if tensor.layout is torch.sparse_coo:
        return [*_storages(tensor._indices()), *_storages(tensor._values())]
    try:
        return [tensor.untyped_storage()]
    except NotImplementedError:
        return []


def held_bytes(values: Any, device: torch.device) -> int:
    """Bytes on ``device`` of the tensors in nested containers, each storage once; of wrappers what is behind them."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.device == device]
    storages = {storage._cdata: storage.nbytes() for tensor in tensors for storage in _storages(tensor)}
    return sum(storages.values())


def measure(step: Callable[[], object], parameters: Iterable[torch.Tensor], timeline: bool = False) -> Memory:
    """Run ``step()`` once and return its peaks, in bytes above what was live before.

    Clear gradients (``set_to_none=True``) before or inside ``step``: gradients that exist already do not count, so the
    first and a later step would differ.

    Args:
        step: forward, backward and whatever else is to be measured.
        parameters: whose gradients do not count as activations.
        timeline: whether to also return (live, gradients) after every op.
    """
    gc.collect()  # automatic collections, which free the step's reference cycles, then come at the same ops each time
    tracker = LiveBytes(parameters)
    with tracker:
        step()
    return Memory(tracker.peak_activations, tracker.peak, tuple(tracker.timeline) if timeline else ())


def saved_storages(
    function: Callable[[], Result], exclude: Iterable[torch.Tensor] = ()
) -> tuple[Result, dict[int, int]]:
    """Run ``function()`` and list the storages that autograd saves for backward, each once.

    Works on fake tensors too. Not seen: what a custom ``autograd.Function`` keeps as attributes of its context.

    Args:
        function: the forward pass.
        exclude: tensors whose storages are left out, as a rule parameters and buffers.

    Returns:
        the result of ``function()``, and the bytes of each storage by an id that is unique among them and equals
        ``tensor.untyped_storage()._cdata`` while that tensor lives.
    """
    excluded = {storage._cdata for tensor in exclude for storage in _storages(tensor)}
    saved: dict[int, torch.UntypedStorage] = {}  # holding them keeps the ids unique: `function` may free some again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for storage in _storages(tensor):
            if storage._cdata not in excluded:
                saved[storage._cdata] = storage
        return tensor.detach()  # the tensor itself would refer back to the node that saves it, and never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, {key: storage.nbytes() for key, storage in saved.items()}
