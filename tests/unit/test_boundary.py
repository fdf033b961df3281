"""Where the gradient stops: tensors that are replaced for all who hold them, let go of, or wait on the host."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from gradients import assert_same, gradients
from localgrad.boundary import BlockGraph, Released, becomes, stopped
from localgrad.errors import PartitionError, TrainingError
from localgrad.isolation import parameters_reached
from localgrad.measure.memory import LiveBytes
from localgrad.methods import accumulation, dgl, windows
from localgrad.spans import Span

TASK = localgrad.tasks.classification(3)
DGL = dgl(TASK, head="linear")


def data(size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 6, generator=generator), torch.arange(size) % 3


def step(network: localgrad.LocalNetwork) -> dict[str, Tensor | None]:
    network.zero_grad(set_to_none=True)
    localgrad.backward(network, *data())
    return gradients(network)


class Net(nn.Module):
    """Blocks begin at ``b``, ``c`` and ``d``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = torch.tanh(self.b(x))
        return self.d(torch.tanh(self.c(x)))


CUTS = ("b", "c", "d")


def localized(model: nn.Module, method: localgrad.Method = DGL, cuts: Any = CUTS) -> Any:
    torch.manual_seed(1)
    return localgrad.localize(model, method, cuts, example=data(4)[0])


# --- becomes -----------------------------------------------------------------------------------------------------


def test_whoever_holds_a_tensor_holds_its_value() -> None:
    w = torch.randn(3, requires_grad=True)
    tensor = w.exp()
    held = {"list": [tensor], "tuple": (tensor,)}
    loss, number, version, value = (tensor * tensor).sum(), id(tensor), tensor._version, tensor.detach().clone()
    becomes(tensor, stopped(tensor))
    for one in (tensor, held["list"][0], held["tuple"][0]):
        assert one.grad_fn is None and not one.requires_grad and torch.equal(one, value)
    assert (id(tensor), tensor._version) == (number, version)
    tensor.mul_(1.0)  # the holder may write: nothing that the graph saved is another's, and none is lost
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_graph_behind_goes_back_as_if_nothing_had_happened() -> None:
    w = torch.randn(3, requires_grad=True)
    tensor = w.exp()
    loss = (tensor * tensor).sum()
    becomes(tensor, stopped(tensor))
    loss.backward()
    torch.testing.assert_close(w.grad, 2 * (2 * w).exp().detach())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda t: t[1:],
    "transposed": lambda t: t.t(),
    "reshaped": lambda t: t.view(-1),
    "chunk": lambda t: t.chunk(2)[1],
    "expanded": lambda t: t[:1].expand(4, 3),
    "view of a view": lambda t: t.view(-1)[2:].view(5, 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_replaced_alone(name: str) -> None:
    """Neither the base nor another view of it loses its graph."""
    w = torch.randn(4, 3, requires_grad=True)
    base = w * 2
    view, other = VIEWS[name](base), VIEWS[name](base)
    expected, strides = view.detach().clone(), view.stride()
    becomes(view, stopped(view))
    assert view.grad_fn is None and torch.equal(view, expected) and view.stride() == strides
    assert other.requires_grad and base.requires_grad
    (other.sum() + base.sum()).backward()
    assert w.grad is not None


@pytest.mark.parametrize("subclass", [nn.Parameter, type("Own", (Tensor,), {})])
def test_a_tensor_keeps_its_class(subclass: type[Tensor]) -> None:
    tensor = torch.randn(2).as_subclass(subclass)
    becomes(tensor, torch.zeros(2))
    assert type(tensor) is subclass and not tensor.any()


def retained(view: bool = False) -> tuple[Tensor, Tensor]:
    w = torch.randn(2, 3, requires_grad=True)
    tensor = (w * 2).t() if view else w * 2
    tensor.retain_grad()
    return w, tensor


def test_a_tensor_whose_gradient_is_retained_is_detached_in_place() -> None:
    w, tensor = retained()
    holder, loss = [tensor], tensor.square().sum()
    loss.backward()
    becomes(tensor, stopped(tensor))
    assert not holder[0].requires_grad and torch.equal(tensor.grad, 2 * tensor) and w.grad is not None


REFUSED: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "a view": lambda: ((t := retained(view=True)[1]), stopped(t)),
    "a value with a gradient": lambda: ((t := retained()[1]), stopped(t, differentiable=True)),
    "no data": lambda: ((t := retained()[1]), Released(t)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_tensor_whose_gradient_is_retained_is_refused_where_detaching_would_not_do(what: str) -> None:
    tensor, value = REFUSED[what]()
    before = tensor.grad_fn
    shape = r"\(3, 2\)" if what == "a view" else r"\(2, 3\)"
    with pytest.raises(PartitionError, match=rf"shape {shape} that crosses a boundary.*retain_grad\(\)"):
        becomes(tensor, value)
    assert tensor.grad_fn is before


class Retaining(Net):
    """The gradient of the features behind ``b`` is wanted; as a view, or as they are."""

    def __init__(self, view: bool = False) -> None:
        super().__init__()
        self.view, self.kept = view, list[Tensor]()
        self.retain = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        x = x.view(-1, 8) if self.view else x
        if self.retain:
            x.retain_grad()
            self.kept[:] = [x]
        return self.d(torch.tanh(self.c(x)))


def test_features_whose_gradient_is_retained() -> None:
    network = localized(Retaining())
    expected = step(network)
    network.model.retain = True
    assert_same(step(network), expected)
    assert not network.model.kept[0].requires_grad


def test_the_gradient_of_features_that_is_retained_can_be_read_after_the_step() -> None:
    network = localized(Retaining())
    network.model.retain = True
    step(network)
    model, x = network.model, data()[0]
    features = torch.tanh(model.b(torch.tanh(model.a(x)))).detach().requires_grad_()
    F.cross_entropy(network.auxiliary_of(Span(1, 2))(features)[0], data()[1]).backward()
    assert model.kept[0].grad is not None and torch.equal(model.kept[0].grad, features.grad)


@pytest.mark.parametrize("method, view", [(DGL, True), (windows(DGL), False)], ids=["view", "window"])
def test_features_whose_gradient_is_retained_may_be_refused(method: localgrad.Method, view: bool) -> None:
    network = localized(Retaining(view), method)
    expected = step(network)
    network.model.retain = True
    with pytest.raises(PartitionError, match=r"\(12, 8\) that crosses a boundary is held by autograd.*retain_grad"):
        step(network)
    network.model.retain = False
    assert_same(step(network), expected)


# --- Released ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 0, 3), (5, 1, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_is_let_go_of_keeps_its_form_and_holds_no_data(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    refs = [weakref.ref(tensor.untyped_storage())]
    becomes(tensor, Released(tensor))
    assert (tensor.shape, tensor.dtype, tensor.device.type) == (shape, dtype, "cpu")
    assert (tensor.dim(), len(tensor.shape), tensor.numel()) == (len(shape), len(shape), math.prod(shape))
    gc.collect()
    assert refs[0]() is None


READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda real, gone: real + gone,
    "multiply a row": lambda real, gone: real * gone[0],
    "concatenate": lambda real, gone: torch.cat([real, gone]),
    "stack": lambda real, gone: torch.stack([real, gone]),
    "batch norm": lambda real, gone: F.batch_norm(gone, real[0], real[1].abs(), training=False),
    "loss": lambda real, gone: F.mse_loss(real, gone),
    "where": lambda real, gone: torch.where(gone > 0, real, real * 2),
    "mask": lambda real, gone: real[gone > 0],
    "copy": lambda real, gone: real.copy_(gone),
    "item": lambda real, gone: gone.sum().item(),
    "condition": lambda real, gone: bool((gone > 0).all()),
    "numpy": lambda real, gone: gone.numpy(),
    "list": lambda real, gone: gone.tolist(),
    "to the host": lambda real, gone: gone.to("cpu", torch.float64),
    "a scalar loss": lambda real, gone: (real.sum() + gone.sum()).backward(),
    "a scalar factor": lambda real, gone: (real.sum() * gone.mean()).backward(),
}


# Kernels that do not look at devices: what comes out is unchanged, or memory as it was found.
UNSEEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add in place": lambda real, gone: real.add_(gone),
    "multiply in place": lambda real, gone: real.mul_(gone),
    "a gate in place": lambda real, gone: real.mul_(torch.sigmoid(gone)),
    "fill a mask": lambda real, gone: real.masked_fill_(gone > 0, 0.0),
    "matrix product": lambda real, gone: real @ gone,
    "matrix product of it": lambda real, gone: gone @ real,
    "linear": lambda real, gone: F.linear(gone, real),
    "convolution": lambda real, gone: F.conv1d(gone[None], real[..., None]),
    "batched": lambda real, gone: torch.baddbmm(real[None], real[None], gone[None]),
    "distance": lambda real, gone: torch.cdist(real, gone),
    "alone": lambda real, gone: torch.relu(gone),
}


@pytest.mark.parametrize("name", READS)
def test_reading_what_was_let_go_of_is_an_error(name: str) -> None:
    w = torch.randn(4, 4, requires_grad=True)
    real, gone = w * 2, torch.randn(4, 4)
    becomes(gone, Released(gone))
    with pytest.raises((RuntimeError, TypeError, localgrad.errors.LocalgradError)):
        READS[name](real, gone)
    assert w.grad is None


class Late(Net):
    """Reads in the last block what the first one made, if it is told to."""

    late: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        early = torch.tanh(self.a(x))
        x = torch.tanh(self.c(torch.tanh(self.b(early))))
        return self.d(x if self.late is None else self.late(x, early))


LATE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, early: x + early,
    "concatenation": lambda x, early: torch.cat([x[:, :4], early[:, 4:]], 1),
    "scalar": lambda x, early: x * early.mean(),
    "normalised": lambda x, early: x + F.layer_norm(early, (8,)),
    "sum in place": lambda x, early: (x * 1.0).add_(early),
    "gate in place": lambda x, early: (x * 1.0).mul_(early),
    "attention": lambda x, early: x @ (early.t() @ early),
}


@pytest.mark.parametrize("name", LATE)
def test_a_forward_that_reads_later_than_in_the_rehearsal_fails_loudly(name: str) -> None:
    network = localized(Late())
    expected = step(network)
    network.model.late = LATE[name]
    with pytest.raises(TrainingError, match=r"block 2 read a tensor that no block reads so late.*let go of"):
        step(network)
    assert not any("_compiled_call_impl" in vars(module) for module in network.model.modules())
    network.model.late = None
    assert_same(step(network), expected)
    network.model.late = LATE[name]  # and localize again makes it right
    assert all(gradient is not None for gradient in step(localized(network.model)).values())


@pytest.mark.parametrize("keeper", ["hook", "attribute"])
def test_what_hooks_and_attributes_keep_is_there_after_the_step(keeper: str) -> None:
    """Activations for a log, attention maps for a figure."""
    kept: list[Tensor] = []

    class Showing(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.b(torch.tanh(self.a(x))))
            if keeper == "attribute":
                kept[:] = [x]
            return self.d(torch.tanh(self.c(x)))

    model = Showing()
    if keeper == "hook":
        model.b.register_forward_hook(lambda module, args, output: kept.__setitem__(slice(None), [output]))
    network = localized(model)
    step(network)
    (found,) = kept
    with torch.no_grad():
        model(data()[0])
    assert torch.equal(found, kept[0])


def test_evaluation_lets_go_of_nothing() -> None:
    network = localized(Late()).eval()
    network.model.late = torch.add
    (found,) = (output for _, term, output in localgrad.local_outputs(network, data()[0]) if term is None)
    assert torch.equal(found, network(data()[0]))


# --- the graph of a block ----------------------------------------------------------------------------------------


def test_gradients_are_caught_where_a_span_goes_on() -> None:
    w = torch.randn(3, requires_grad=True)
    made = [w.exp(), w.sin()]
    graph = BlockGraph(made, 0)
    first, second = (graph.captured(tensor, slot) for slot, tensor in enumerate(made))
    assert first.requires_grad and torch.equal(first, made[0]) and not parameters_reached([first, second]) & {id(w)}
    (first * 2).sum().backward()
    (first * 3).sum().backward()
    caught = graph.take_gradients()
    assert caught[1] is None and torch.equal(caught[0], torch.full((3,), 5.0)) and w.grad is None
    assert graph.take_gradients() == [None, None]
    (second * 7).sum().backward()
    graph.backward([caught[0], *graph.take_gradients()[1:]], (), again=False)
    torch.testing.assert_close(w.grad, 5 * w.exp().detach() + 7 * w.cos().detach())
    assert graph.root is None


def test_a_caught_gradient_is_never_written_to() -> None:
    """Autograd hands the same tensor to several; the sum of two gradients is a new tensor."""
    w = torch.ones(2, requires_grad=True)
    graph = BlockGraph([made := w * 1], 0)
    features = graph.captured(made, 0)
    given = torch.ones(2)
    features.backward(given, retain_graph=True)
    features.backward(given)
    assert torch.equal(given, torch.ones(2)) and torch.equal(graph.take_gradients()[0], torch.full((2,), 2.0))


def test_a_caught_gradient_keeps_its_strides() -> None:
    w = torch.ones(2, 3, 4, 4, requires_grad=True)
    graph = BlockGraph([made := w * 1], 0)
    given = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    graph.captured(made, 0).backward(given)
    (caught,) = graph.take_gradients()
    assert caught.stride() == given.stride() != made.stride()


@pytest.mark.parametrize("again", [False, True])
def test_a_graph_is_freed_unless_it_is_needed_again(again: bool) -> None:
    w = torch.randn(3, requires_grad=True)
    made = w.exp()
    storage = weakref.ref(made.untyped_storage())  # saved for the backward pass
    graph = BlockGraph([made], 0)
    becomes(made, graph.captured(made, 0))
    gradients = [torch.ones(3)]
    del made
    graph.backward(gradients, (), again)
    assert gradients == [] and (storage() is not None) == again
    if again:
        graph.backward([torch.ones(3)], (), again=False)
        assert storage() is None
        torch.testing.assert_close(w.grad, 2 * w.exp().detach())


def test_a_graph_without_gradient_is_left_alone_and_freed() -> None:
    w = torch.randn(3, requires_grad=True)
    graph = BlockGraph([w.exp()], 0)
    graph.backward([None], (), again=False)
    assert w.grad is None and graph.root is None
    BlockGraph([], 0).backward([], (), again=False)


def test_where_a_region_runs_again_the_stop_is_differentiable() -> None:
    w = torch.randn(3, requires_grad=True)
    made = w.exp()
    assert stopped(made).grad_fn is None
    differentiable = stopped(made, differentiable=True)
    assert differentiable.requires_grad and torch.equal(differentiable, made)
    assert id(w) not in parameters_reached([differentiable])
    differentiable.sum().backward()
    assert w.grad is None
    with torch.no_grad():
        assert stopped(made, differentiable=True).requires_grad


def test_the_leaves_of_a_graph() -> None:
    a, b, c = (torch.randn(2, requires_grad=True) for _ in range(3))
    shared = a.exp()
    assert parameters_reached([shared * b + shared, None, torch.ones(1)]) == {id(a), id(b)}
    assert parameters_reached([c]) == set()  # a leaf has no graph


# --- leaks -------------------------------------------------------------------------------------------------------


class Leaky(Net):
    """Passes the sine of what ``a`` made on in an attribute, if it is told to."""

    leaks = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.hidden = [torch.sin(x)] if self.leaks else []
        x = torch.tanh(self.c(torch.tanh(self.b(torch.tanh(x)))))
        return self.d(x + self.hidden[0] if self.leaks else x)


def without_leak() -> Leaky:
    model = Leaky()
    model.leaks = False
    return model


def test_a_cut_that_a_leak_crosses_is_refused_by_name() -> None:
    with pytest.raises(PartitionError, match=r"cuts: 'b' is no cut point: a tensor made by SinBackward0 crosses"):
        localized(Leaky())


def test_a_cut_that_a_leak_crosses_is_not_offered() -> None:
    partition = localgrad.partition.Partition(Leaky(), data(4)[0])
    assert [cut.name for cut in partition.cuts] == ["d"] == [cut.name for cut in partition.finest]


def test_a_leak_that_begins_after_localize_is_found_by_the_first_step() -> None:
    model = without_leak()
    network = localized(model)
    model.leaks = True
    message = r"the loss of span \(2, 3\) reaches 'a.weight' of block 0, which lies outside.*elsewhere than at 'c'"
    with pytest.raises(PartitionError, match=message):
        step(network)
    model.leaks = False
    expected = step(localized(without_leak()))
    assert_same(step(network), expected)


def test_a_leak_that_carries_no_gradient_is_none() -> None:
    """Statistics, targets of a moving average, caches of detached tensors."""

    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.hidden = [torch.sin(x).detach()]
            x = torch.tanh(self.c(torch.tanh(self.b(torch.tanh(x)))))
            return self.d(x + self.hidden[0])

    network = localized(Detached())
    assert all(gradient is not None for gradient in step(network).values())


# --- features that wait on the host ------------------------------------------------------------------------------

PARTS = 4


class Seeing(Net):
    """Notes what blocks 1 and 2 read, by a hook of the modules they begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[Tensor]] = [[], []]
        for module, seen in zip((self.b, self.c), self.seen, strict=True):
            module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach().clone()))


def waiting(wait: Any, parts: int = PARTS, method: localgrad.Method = DGL, **changes: Any) -> Any:
    return localized(Seeing(), accumulation(method, parts=parts, wait=wait), **changes)


@pytest.mark.parametrize("method", [DGL, windows(DGL)], ids=lambda m: m.name)
def test_features_that_wait_on_the_host_come_back_as_they_were(method: localgrad.Method) -> None:
    assert_same(step(waiting("host", method=method)), step(waiting("device", method=method)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_that_wait_in_bf16_are_rounded_exactly_once_a_boundary(dtype: torch.dtype) -> None:
    network = waiting("bf16").to(dtype)
    reference = copy.deepcopy(network)
    for seen in network.model.seen:
        seen.clear()
    x, y = data()
    x = x.to(dtype)
    localgrad.backward(network, x, y)

    model = reference.model
    made = list(x.chunk(PARTS))
    layers = [model.a, model.b, model.c]
    for block, layer in enumerate(layers):
        for part, targets in enumerate(y.chunk(PARTS)):
            features = torch.tanh(layer(made[part]))
            (output,) = reference.auxiliary_of(Span(block, block + 1))(features)  # not rounded
            (F.cross_entropy(output, targets) / PARTS).backward()
            made[part] = features.detach().to(torch.bfloat16).to(dtype)
        if block < 2:
            found = network.model.seen[block]
            assert all(torch.equal(a, b) for a, b in zip(found, made, strict=True))
            assert all(one.dtype == dtype for one in found)
    for part, targets in zip(made, y.chunk(PARTS), strict=True):
        (F.cross_entropy(model.d(part), targets) / PARTS).backward()
    assert_same(gradients(network), gradients(reference))


def test_nothing_waits_where_there_is_one_part() -> None:
    assert_same(step(waiting("bf16", parts=1)), step(waiting("device", parts=1)))


def test_nothing_waits_where_the_parts_run_one_after_the_other() -> None:
    base = localgrad.methods.e2e(TASK)
    assert_same(step(waiting("bf16", method=base)), step(waiting("device", method=base)))


class Wide(nn.Module):
    """Features of ``width`` everywhere, and none that is kept for a backward pass but them."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, width)
        self.d = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))


def live_at_losses(wait: Any, size: int) -> list[int]:
    """Live bytes, without gradients, whenever a loss is handed out."""
    network = localized(Wide(), accumulation(DGL, parts=PARTS, wait=wait))
    x, y = data(size)
    localgrad.backward(network, x, y)
    network.zero_grad(set_to_none=True)
    gc.collect()
    found = []
    with LiveBytes(network.parameters()) as live:
        for _, loss in localgrad.local_losses(network, x, y):
            found.append(live.current - live.gradients)
            loss.backward()
    return found


def test_bytes_that_wait_are_half_in_bf16() -> None:
    """Of every part but the one that runs, one boundary waits."""
    size = 256
    one = size // PARTS * 256 * 4  # bytes of the features of one part
    device, low = live_at_losses("device", size), live_at_losses("bf16", size)
    assert len(device) == 4 * PARTS
    saved = [(a - b) / one for a, b in zip(device, low, strict=True)]
    first = [part / 2 for part in range(PARTS)]  # parts that have passed block 0
    middle = [(PARTS - 1) / 2] * PARTS
    last = [(PARTS - 1 - part) / 2 for part in range(PARTS)]  # parts that have not entered the last block
    assert saved == [*first, *middle, *middle, *last]


def test_the_waiting_features_are_all_that_grows_with_the_parts_before() -> None:
    size = 256
    one = size // PARTS * 256 * 4
    device = live_at_losses("device", size)
    counts = 1  # byte: whether a label of the part counts at all
    assert [b - a for a, b in pairwise(device[:PARTS])] == [one + counts] * (PARTS - 1)
