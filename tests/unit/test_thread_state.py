"""Every private or little used name of torch that the suspended forward rests on, and the state that it sets aside.

The first part holds torch to what `localgrad.suspension.thread_state`, `localgrad.boundary`, `localgrad.forward` and
`localgrad.partition.moments` believe of it: a new torch that changes one of these fails here, by name.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C import _autograd
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from localgrad.partition.record import clock
from localgrad.suspension import thread_state

BF16 = torch.bfloat16


class Dispatched(TorchDispatchMode):
    """Counts the operations that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """The same, one level higher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


# --- torch._C._swap_tensor_impl (boundary.py) --------------------------------------------------------------------


def test_swap_gives_every_holder_the_other_tensor_and_leaves_the_graph_alone() -> None:
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    tensor = w.exp()  # saves its own result
    expected = tensor.detach().clone()
    holders, versions, name = [tensor, {"a": tensor}], tensor._version, id(tensor)
    loss = (tensor * tensor).sum()
    torch._C._swap_tensor_impl(tensor, tensor.detach())
    assert holders[0] is tensor and id(tensor) == name
    assert not holders[1]["a"].requires_grad and holders[0].grad_fn is None
    assert tensor._version == versions and torch.equal(tensor, expected)
    loss.backward()
    torch.testing.assert_close(w.grad, 2 * expected * expected)


def test_swap_takes_views_and_other_shapes_devices_and_dtypes() -> None:
    base = torch.randn(4, 3, requires_grad=True) * 1.0
    view = base[1:]
    loss = view.sum()
    torch._C._swap_tensor_impl(view, torch.empty(2, dtype=BF16, device="meta"))
    assert (view.shape, view.dtype, view.device.type) == ((2,), BF16, "meta") and not view._is_view()
    assert base.shape == (4, 3) and loss.requires_grad


def test_swap_keeps_weak_references_to_the_tensor() -> None:
    """They point to the holder's tensor, before and after: `localgrad.engine.Held` finds it again."""
    import weakref

    tensor = torch.randn(2, requires_grad=True) * 2
    ref = weakref.ref(tensor)
    torch._C._swap_tensor_impl(tensor, tensor.detach())
    assert ref() is tensor and not ref().requires_grad


def test_swap_refuses_a_tensor_whose_gradient_autograd_retains() -> None:
    tensor = torch.randn(2, requires_grad=True) * 2
    tensor.retain_grad()
    with pytest.raises(RuntimeError):
        torch._C._swap_tensor_impl(tensor, tensor.detach())
    assert tensor.requires_grad and tensor.grad_fn is not None  # as it was


def test_a_tensor_that_only_autograd_holds_keeps_its_weak_reference() -> None:
    import weakref

    w = torch.randn(3, requires_grad=True)
    tensor = w.exp()
    ref, loss = weakref.ref(tensor), tensor.sum()
    del tensor
    again = loss.grad_fn.next_functions[0][0]._saved_result
    assert ref() is None or ref() is again  # never another tensor


# --- Module._compiled_call_impl, _call_impl, __getstate__ (forward.py) -------------------------------------------


def test_a_module_asks_for_its_compiled_call_first() -> None:
    module = nn.Linear(2, 2)
    assert nn.Module._compiled_call_impl is None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def door(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return module._call_impl(*args, **kwargs)

    hooked: list[str] = []
    module.register_forward_pre_hook(lambda *_: hooked.append("before"))
    module.register_forward_hook(lambda *_: hooked.append("after"))
    x = torch.randn(3, 2)
    module.__dict__["_compiled_call_impl"] = door
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias)) and module(input=x).shape == (3, 2)
    assert calls == [((x,), {}), ((), {"input": x})]
    assert hooked == ["before", "after"] * 2  # hooks run inside
    assert module._compiled_call_impl is door and "_compiled_call_impl" not in nn.Linear(2, 2).__dict__
    del module.__dict__["_compiled_call_impl"]
    assert module(x).shape == (3, 2) and len(calls) == 2


def test_compile_puts_its_call_where_the_door_goes() -> None:
    module = nn.Linear(2, 2)
    module.compile(backend="eager")
    assert callable(module.__dict__["_compiled_call_impl"])


def test_no_copy_and_no_pickle_has_the_compiled_call() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].__dict__["_compiled_call_impl"] = lambda *_: None  # which could not be pickled
    for other in (copy.deepcopy(module), copy.copy(module[0]), pickle.loads(pickle.dumps(module))):  # noqa: S301
        assert all("_compiled_call_impl" not in vars(part) for part in other.modules())


# --- Node._sequence_nr, next_functions, variable (moments.py, boundary.py) ---------------------------------------


def test_sequence_numbers_are_a_clock() -> None:
    x = torch.randn(3, requires_grad=True)
    made, read = [], [clock()]
    for step in (torch.sin, torch.exp, lambda t: t.view(1, 3), lambda t: t.unbind(0)[0]):
        x = step(x)
        made.append(x.grad_fn._sequence_nr())
        read.append(clock())
    assert all(a < b < c for a, b, c in zip(read, made, read[1:], strict=False))
    with torch.no_grad():
        torch.sin(x)
        assert clock() > read[-1]  # the clock ticks, and can be read, without gradients


def test_next_functions_lead_to_the_nodes_and_numbers_of_what_was_read() -> None:
    w = torch.randn(2, 3, requires_grad=True)
    first, second = w.unbind(0)
    total = first * second
    assert [node for node, _ in total.grad_fn.next_functions] == [first.grad_fn, second.grad_fn]
    assert [number for _, number in total.grad_fn.next_functions] == [first.output_nr, second.output_nr] == [0, 1]
    assert first.grad_fn == second.grad_fn and hash(first.grad_fn) == hash(second.grad_fn)
    assert (torch.ones(3) * first).grad_fn.next_functions[0][0] is None
    assert total.grad_fn.name().startswith("MulBackward")


def test_the_node_of_a_leaf_knows_it() -> None:
    w = torch.randn(2, requires_grad=True)
    ((leaf, _),) = w.sin().grad_fn.next_functions
    assert leaf.variable is w
    assert not hasattr(w.sin().grad_fn, "variable")


# --- the names of thread_state.py --------------------------------------------------------------------------------


def test_grad_mode_can_be_written() -> None:
    torch._C._set_grad_enabled(False)
    try:
        assert not torch.is_grad_enabled()
    finally:
        torch._C._set_grad_enabled(True)
    assert torch.is_grad_enabled()


def test_autocast_is_there_for_the_cpu_and_not_for_meta() -> None:
    assert torch._C._is_autocast_available("cpu") and thread_state._DEVICES[0] == "cpu"
    assert torch.amp.is_autocast_available("cpu") and not torch.amp.is_autocast_available("meta")


def test_autocast_values_can_be_written_without_a_context() -> None:
    before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    assert before == (False, BF16, True)
    try:
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.float16)
        torch.set_autocast_cache_enabled(False)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
        assert not torch.is_autocast_cache_enabled()
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_dtype("cpu", BF16)
        torch.set_autocast_cache_enabled(True)
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_autocast_counts_its_contexts_and_whoever_leaves_the_last_clears_the_cache() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    x = torch.ones(1, 2)
    assert thread_state._nesting() == 0

    def changed() -> bool:
        """Whether a change of the weight is seen: it is not while the cast weight is in the cache."""
        before = F.linear(x, weight)
        with torch.no_grad():
            weight.add_(1.0)
        return not torch.equal(F.linear(x, weight), before)

    with torch.autocast("cpu", BF16):
        assert thread_state._nesting() == 1 and not changed()
        with torch.autocast("cpu", BF16):
            assert thread_state._nesting() == 2
        assert not changed()
        torch.clear_autocast_cache()
        assert torch.equal(F.linear(x, weight), F.linear(x, weight.to(BF16)))
        assert not changed()
    assert thread_state._nesting() == 0
    with torch.autocast("cpu", BF16):
        assert torch.equal(F.linear(x, weight), F.linear(x, weight.to(BF16)))
        assert torch.autocast_increment_nesting() == 2 and thread_state._nesting() == 2
        assert torch.autocast_decrement_nesting() == 1


def test_attention_kernels_can_be_read_and_written() -> None:
    assert {"flash", "math", "mem_efficient"} <= set(thread_state._KERNELS)
    for name in thread_state._KERNELS:
        read, write = getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}")
        before = read()
        try:
            write(not before)
            assert read() is not before
        finally:
            write(before)
    order = torch._C._get_sdp_priority_order()
    assert order and all(isinstance(number, int) for number in order)  # 2.8 names the overridable kernel twice
    try:
        torch._C._set_sdp_priority_order(order[::-1])
        assert torch._C._get_sdp_priority_order() == order[::-1]
    finally:
        torch._C._set_sdp_priority_order(order)


def test_no_attention_kernel_is_missed() -> None:
    """What `sdpa_kernel` switches is what is set aside, so that a kernel of a new torch is found here."""
    with sdpa_kernel([SDPBackend.MATH]):
        inside = thread_state.values()
    known = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
             "mem_efficient": SDPBackend.EFFICIENT_ATTENTION, "overrideable": SDPBackend.OVERRIDEABLE}  # fmt: skip
    backends = {b for name, b in SDPBackend.__members__.items() if name != "ERROR"}
    assert {known[name] for name in thread_state._KERNELS} == backends
    # "overrideable" is not switched by every torch that has it
    switched = {name for name, on in zip(thread_state._KERNELS, inside.kernels, strict=True) if on}
    assert "math" in switched and switched <= {"math", "overrideable"}


@pytest.mark.parametrize("kind", [Functions, Dispatched])
def test_modes_can_be_taken_off_their_stack_and_put_back(kind: Any) -> None:
    if kind is Functions:
        height, push = torch._C._len_torch_function_stack, torch._C._push_on_torch_function_stack
        pop: Callable[[], Any] = torch._C._pop_torch_function_stack
    else:
        height, push = torch._C._len_torch_dispatch_stack, torch._C._push_on_torch_dispatch_stack
        pop = lambda: torch._C._pop_torch_dispatch_stack(None)  # noqa: E731
    assert height() == 0
    with kind() as outer, kind() as inner:
        assert height() == 2
        torch.ones(1)
        both = (outer.count, inner.count)
        assert min(both) > 0
        assert pop() is inner and height() == 1
        torch.ones(1)
        assert outer.count > both[0] and inner.count == both[1]
        assert pop() is outer and height() == 0
        torch.ones(1)
        assert inner.count == both[1]
        push(outer)
        push(inner)
        torch.ones(1)
        assert inner.count > both[1]
    assert height() == 0


def test_saved_tensor_hooks_can_be_taken_off_their_stack_and_put_back() -> None:
    packed: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append("pack")
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        packed.append("unpack")
        return tensor

    w = torch.ones(2, requires_grad=True)
    assert _autograd._top_saved_tensors_default_hooks(True) is None
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        top = _autograd._top_saved_tensors_default_hooks(True)
        assert top[0] is pack and top[1] is unpack
        _autograd._pop_saved_tensors_default_hooks()
        assert _autograd._top_saved_tensors_default_hooks(True) is None
        w.exp()
        assert not packed
        _autograd._push_saved_tensors_default_hooks(pack, unpack)
        w.exp().sum().backward()
        assert packed == ["pack", "unpack"]
    assert _autograd._top_saved_tensors_default_hooks(True) is None


def test_non_reentrant_checkpointing_shows_as_saved_tensor_hooks() -> None:
    seen: list[bool] = []

    def region(x: Tensor) -> Tensor:
        seen.append(thread_state.heights().hooks is not None)
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    checkpoint(region, x, use_reentrant=False)
    assert seen == [True] and thread_state.heights().hooks is None


# --- values, heights, lift_off, put_on ---------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


PACKED: list[int] = []


def pack(tensor: Tensor) -> Tensor:
    PACKED.append(1)
    return tensor


def hooks() -> contextlib.AbstractContextManager[Any]:
    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


@contextlib.contextmanager
def nested(*contexts: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", BF16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast twice": lambda: nested(CONTEXTS["autocast"], CONTEXTS["autocast float16"]),
    "autocast without cache": lambda: torch.autocast("cpu", BF16, cache_enabled=False),
    "autocast off inside": lambda: nested(
        CONTEXTS["autocast"], CONTEXTS["dtype"], lambda: torch.autocast("cpu", enabled=False)
    ),
    "no_grad": torch.no_grad,
    "enable_grad in no_grad": lambda: nested(torch.no_grad, CONTEXTS["meta"], torch.enable_grad),
    "meta": lambda: torch.device("meta"),
    "dispatch mode": Dispatched,
    "dispatch modes": lambda: nested(Dispatched, Dispatched),
    "function mode": Functions,
    "function mode and device": lambda: nested(Functions, CONTEXTS["meta"], Functions),
    "saved tensor hooks": hooks,
    "saved tensor hooks twice": lambda: nested(hooks, hooks),
    "save on cpu": torch.autograd.graph.save_on_cpu,
    "attention": lambda: sdpa_kernel([SDPBackend.MATH]),
    "attention in order": lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True),
    "dtype": lambda: default_dtype(torch.float64),
    "everything": lambda: nested(
        CONTEXTS["autocast"], CONTEXTS["meta"], Dispatched, hooks, CONTEXTS["attention"], Functions, CONTEXTS["dtype"]
    ),
}
EVERY = pytest.mark.parametrize("name", CONTEXTS)
WEIGHT = nn.Parameter(torch.ones(2, 2))


def observed() -> tuple[object, ...]:
    """What code sees of the thread's state: by what it computes, and by what is on the stacks."""
    PACKED.clear()
    modes = [*_function_modes(), *_dispatch_modes()]
    counts = [getattr(mode, "count", 0) for mode in modes]
    factory = torch.zeros(1)
    linear = F.linear(torch.ones(1, 2, device="cpu", dtype=torch.float32), WEIGHT)
    squared = linear * linear
    ticked = [getattr(mode, "count", 0) > before for mode, before in zip(modes, counts, strict=True)]
    return (
        (factory.device.type, factory.dtype, linear.dtype, squared.requires_grad, len(PACKED)),
        ticked,
        thread_state.values(),
        thread_state.heights(),
    )


def _function_modes() -> list[Any]:
    return [torch._C._get_function_stack_at(k) for k in range(torch._C._len_torch_function_stack())]


def _dispatch_modes() -> list[Any]:
    return [torch._C._get_dispatch_stack_at(k) for k in range(torch._C._len_torch_dispatch_stack())]


class Aside:
    """A piece of code inside contexts, which can be set aside and gone on with, as a suspended forward is."""

    def __init__(self, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self.context = context

    def enter(self) -> None:
        self.callers, self.base = thread_state.values(), thread_state.heights()
        self.entered = self.context()
        self.entered.__enter__()

    def suspend(self) -> None:
        self.own, self.stacked = thread_state.values(), thread_state.lift_off(self.base)
        thread_state.set_values(self.callers)

    def resume(self) -> None:
        self.callers, self.base = thread_state.values(), thread_state.heights()
        thread_state.put_on(self.stacked)
        thread_state.set_values(self.own)

    def leave(self) -> None:
        self.entered.__exit__(None, None, None)
        thread_state.set_values(self.callers)


@EVERY
def test_a_context_is_set_aside_and_goes_on(name: str) -> None:
    outside = observed()
    one = Aside(CONTEXTS[name])
    one.enter()
    inside = observed()
    assert inside != outside, "this context changes nothing that is observed"
    for _ in range(2):
        one.suspend()
        assert observed() == outside
        one.resume()
        assert observed() == inside
    one.leave()
    assert observed() == outside


@EVERY
@pytest.mark.parametrize("other", ["autocast twice", "no_grad", "everything"])
def test_contexts_that_do_not_nest(name: str, other: str) -> None:
    """Two pieces of code are set aside in turn, and the first one entered is the first one left."""
    outside = observed()
    first, second = Aside(CONTEXTS[name]), Aside(CONTEXTS[other])
    seen = {}
    for one in (first, second):
        one.enter()
        seen[one] = observed()
        one.suspend()
        assert observed() == outside
    for one in (second, first, first, second):
        one.resume()
        assert observed() == seen[one]
        one.suspend()
        assert observed() == outside
    for one in (first, second):
        one.resume()
        assert observed() == seen[one]
        one.leave()
        assert observed() == outside


@EVERY
@pytest.mark.parametrize("callers", ["autocast", "no_grad", "dispatch mode", "function mode", "saved tensor hooks",
                                     "meta", "everything"])  # fmt: skip
def test_the_callers_own_contexts_stay(name: str, callers: str) -> None:
    """Set aside inside other contexts of the caller's; gone on with when the caller has entered one more."""
    with CONTEXTS[callers]():
        outside = observed()
        one = Aside(CONTEXTS[name])
        one.enter()
        one.suspend()
        assert observed() == outside
        with CONTEXTS["dispatch mode"](), CONTEXTS["autocast"]():
            further = observed()
            one.resume()
            one.suspend()
            assert observed() == further
        assert observed() == outside
        one.resume()
        one.leave()
        assert observed() == outside


def test_what_is_set_aside_keeps_working_when_the_caller_leaves_its_contexts_meanwhile() -> None:
    outside = observed()
    one = Aside(CONTEXTS["everything"])
    with CONTEXTS["autocast"](), CONTEXTS["function mode"]():
        one.enter()
        one.suspend()
    assert observed() == outside
    one.resume()
    assert thread_state.heights().autocast == 1 and thread_state.heights().modes == 1
    one.leave()
    assert observed() == outside


def test_a_switch_empties_the_cache_of_autocast_on_both_sides() -> None:
    """Kept, it would give a weight that has stepped meanwhile its old value."""
    weight, x = nn.Parameter(torch.ones(2, 2)), torch.ones(1, 2)

    def fresh() -> bool:
        return torch.equal(F.linear(x, weight), F.linear(x.to(BF16), weight.detach().to(BF16)))

    def step() -> None:
        with torch.no_grad():
            weight.add_(1.0)

    with torch.autocast("cpu", BF16):
        one = Aside(CONTEXTS["autocast"])
        one.enter()
        F.linear(x, weight)
        one.suspend()
        step()
        assert fresh()
        step()
        assert not fresh()  # the cache is in use
        one.resume()
        assert fresh()
        one.leave()


def test_every_order_of_two_pieces_of_code_leaves_the_state_as_it_was() -> None:
    outside = observed()
    for order in sorted(set(itertools.permutations([0, 0, 0, 1, 1, 1]))):
        both = [Aside(CONTEXTS["everything"]), Aside(CONTEXTS["autocast off inside"])]
        events = [iter(("enter", "go on", "leave")), iter(("enter", "go on", "leave"))]
        for which in order:
            event = next(events[which])
            both[which].enter() if event == "enter" else both[which].resume()
            both[which].leave() if event == "leave" else both[which].suspend()
            assert observed() == outside, order


def test_torch_is_not_told_of_dispatch_modes_that_are_set_aside() -> None:
    """torch.compile asks these flags, and runs code as it is where they are set."""
    first, second = Aside(CONTEXTS["dispatch mode"]), Aside(CONTEXTS["dispatch mode"])

    def told() -> bool:
        return _python_dispatch.is_in_torch_dispatch_mode()

    found = []
    for one in (first, second):
        one.enter()
        one.suspend()
        found.append(told())
    for one in (first, second):
        one.resume()
        one.leave()
        found.append(told())
    assert found == [False] * 4
