"""The byte tracker against counts made by hand. Tensors are float32: 4 bytes an element."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from localgrad.measure.memory import LiveBytes, Memory, measure, saved_storages


@pytest.fixture(autouse=True, scope="module")
def no_collection_in_between() -> Iterator[None]:
    """What is freed must be freed by reference counts alone. (Freezing makes the explicit collections fast.)"""
    gc.disable()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.enable()


# --- what counts -------------------------------------------------------------------------------------------------


def test_one_op() -> None:
    x = torch.ones(10, requires_grad=True)
    with LiveBytes() as tracker:
        y = x * 2
        assert (tracker.current, tracker.peak) == (40, 40)
        del y
        assert (tracker.current, tracker.peak) == (0, 40)


def test_views_aliases_and_in_place_ops_add_nothing() -> None:
    with LiveBytes() as tracker:
        x = torch.zeros(4, 5)
        views = [x.view(5, 4), x.t(), x[1:], x.expand(3, 4, 5), x.detach(), *x.split(2), x.data, x.unbind()]
        x.add_(1).relu_()
        torch.add(x, 1, out=x)
        torch._foreach_mul_([x], 2)
        assert (tracker.current, tracker.peak) == (80, 80)
        del x
        assert tracker.current == 80  # the views hold it
        del views
        assert tracker.current == 0


def test_what_existed_before_does_not_count() -> None:
    x, parameter, buffer = torch.ones(10), nn.Parameter(torch.ones(10)), torch.ones(10)
    with LiveBytes() as tracker:
        view = parameter.view(2, 5)
        x.mul_(2)
        buffer.copy_(x)
        torch.add(x, x, out=buffer)
        joined = torch.cat([parameter, x])
        assert tracker.current == 80
        del x, buffer
        assert tracker.current == 80
        del joined, view
    assert tracker.current == 0


def test_tensors_made_from_python_count() -> None:
    with LiveBytes() as tracker:
        x = torch.tensor([1.0, 2.0, 3.0])
        assert tracker.current == 12
        y = x.clone()
        assert tracker.current == 24
        del x, y
    assert tracker.current == 0


def test_resized_storages_are_read_again() -> None:
    old = torch.zeros(10)
    with LiveBytes() as tracker:
        new = torch.zeros(10)
        new.resize_(30)
        assert tracker.current == 120
        new.untyped_storage().resize_(0)
        new.detach()
        assert tracker.current == 0
        new.untyped_storage().resize_(80)
        new.detach()
        assert tracker.current == 80
        old.resize_(15)
        assert tracker.current == 80 + 20  # only what it grew by
        old.resize_(0)
        old.untyped_storage().resize_(0)
        old.detach()
        assert tracker.current == 80  # never below what it was
        del new, old
    assert tracker.current == 0


def test_nested_outputs_and_none() -> None:
    with LiveBytes() as tracker:
        values, indices = torch.arange(4.0).sort()  # 16 + 32, and 16 freed
        pieces = torch._foreach_add([values, values], 1.0)  # a list of two
        norm = nn.functional.batch_norm(values.view(4, 1), None, None, training=True)  # outputs beside it are empty
        assert tracker.current == 16 + 32 + 2 * 16 + 16
        del values, indices, pieces, norm
    assert tracker.current == 0


def test_sparse_tensors() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    with LiveBytes(embedding.parameters()) as tracker:
        embedding(torch.tensor([1, 2])).sum().backward()
        assert tracker.current == tracker.gradients == 2 * 8 + 2 * 3 * 4
        embedding.weight.grad = None
        assert tracker.current == tracker.gradients == 0


def test_wrapper_subclasses_count_by_what_they_wrap() -> None:
    two = pytest.importorskip("torch.testing._internal.two_tensor")
    x = two.TwoTensor(torch.ones(10), torch.ones(10))
    with LiveBytes() as tracker:
        y = x + 1
        assert tracker.current == 80
        z = y.view(2, 5).relu_()
        assert tracker.current == 80
        del y, z
    assert tracker.current == 0


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.ones(10, requires_grad=True)
        with LiveBytes([x]) as tracker:
            y = x.exp()
            assert tracker.current == 40
            y.sum().backward()
            assert tracker.gradients == 40
            del y
            assert tracker.current == 40


def test_dispatch_is_unchanged() -> None:
    x = torch.randn(3, requires_grad=True)
    expected = torch.autograd.grad((x.exp() @ x).tanh(), x)[0]
    with LiveBytes():
        found = torch.autograd.grad((x.exp() @ x).tanh(), x)[0]
    assert torch.equal(expected, found)


# --- graphs ------------------------------------------------------------------------------------------------------


def test_linear_relu_by_hand() -> None:
    x, layer = torch.ones(4, 3), nn.Linear(3, 5)
    with LiveBytes(layer.parameters()) as tracker:
        hidden = layer(x)  # (4, 5): 80 bytes; the graph saves x, which is not ours
        assert tracker.current == 80
        out = hidden.relu()
        assert tracker.current == 160
        del hidden  # relu saves its output only
        assert tracker.current == 80
        loss = out.sum()
        del out
        assert tracker.current == 84
        loss.backward()  # frees what relu saved; leaves the gradients, 60 + 20
        assert (tracker.current, tracker.gradients) == (4 + 80, 80)
        del loss
        assert (tracker.current, tracker.gradients) == (80, 80)
    layer.zero_grad()
    assert (tracker.current, tracker.gradients) == (0, 0)
    # 160 after relu; in backward: loss 4, ones 4, out 80, gradient of hidden 80, and then the gradients of the layer.
    assert tracker.peak_activations == 4 + 4 + 80 + 80
    # Views of the weight and of what relu saves, and the three ops that make something.
    assert tracker.timeline[:5] == [(0, 0), (80, 0), (160, 0), (160, 0), (84, 0)]


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_a_chain_holds_two_tensors_without_a_graph_and_all_with_one(depth: int) -> None:
    x = torch.ones(100, requires_grad=True)

    def chain() -> torch.Tensor:
        h = x
        for _ in range(depth):
            h = h.exp()
        return h

    with torch.no_grad():
        assert measure(chain, ()).peak_total == 400 * min(depth, 2)
    assert measure(chain, ()).peak_total == 400 * depth


def test_backward_frees_as_it_goes() -> None:
    x = torch.ones(100, requires_grad=True)
    with LiveBytes([x]) as tracker:
        h = x
        for _ in range(5):
            h = h.exp()
        gradient = torch.ones(100)
        h.backward(gradient)
        # The loop variable and the seed remain, and x.grad.
        assert (tracker.current, tracker.gradients) == (3 * 400, 400)
        del h, gradient
        assert tracker.current == tracker.gradients == 400
    # 5 outputs, the seed and, at the second exp from the end, the gradient that comes in and the one that goes out.
    # Then each step frees an output and a gradient, and makes one gradient.
    assert tracker.peak_activations == 8 * 400


def test_checkpointing_lowers_the_peak_in_forward_and_backward() -> None:
    blocks = nn.ModuleList(nn.Sequential(*(nn.Sigmoid() for _ in range(4))) for _ in range(4))
    x = torch.ones(1000, requires_grad=True)

    def step(recompute: bool) -> None:
        h = x
        for block in blocks:
            h = checkpoint(block, h, use_reentrant=False) if recompute else block(h)
        h.sum().backward()
        x.grad = None

    plain, recomputed = (measure(lambda r=r: step(r), [x]).peak_activations // 4000 for r in (False, True))
    assert plain == 16 + 2  # every output, a gradient that comes in and one that goes out
    # A tensor between blocks each (the step's h is the last one), the outputs of the block that is being recomputed,
    # and two gradients.
    assert 4 + 4 <= recomputed <= 4 + 4 + 2


def test_gradients_are_exact_and_apart() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2, bias=False))
    model[1].bias.requires_grad_(False)
    size = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    x = torch.randn(5, 8)
    tracker = LiveBytes(model.parameters())
    with tracker:
        for _ in range(3):  # accumulates: nothing new stays
            model(x).sum().backward()
            assert tracker.current == tracker.gradients == size
        model.zero_grad()
        assert tracker.current == tracker.gradients == 0
        model(x).sum().backward()
        model[0].weight.grad = None
        assert tracker.current == tracker.gradients == size - 4 * 8 * 16
        model.zero_grad(set_to_none=False)
        assert tracker.gradients == size - 4 * 8 * 16
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert tracker.gradients == size - 4 * 8 * 16
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(0 <= gradients <= live for live, gradients in tracker.timeline)


def test_a_gradient_is_one_from_the_op_that_makes_it() -> None:
    weight = nn.Parameter(torch.ones(1000, 2))
    x = torch.ones(1, 1000)
    memory = measure(lambda: (x @ weight).sum().backward(), [weight], timeline=True)
    # Product 8, sum 4: the 8000 bytes of the gradient never pass for activations. Beside it lie the loss and its seed.
    assert memory.peak_activations == 12
    assert memory.peak_total == 8000 + 8
    assert max(gradients for _, gradients in memory.timeline) == 8000
    weight.grad = None
    # Gradients of what is not listed are activations.
    assert measure(lambda: (x @ weight).sum().backward(), ()).peak_activations == 8008


def test_gradients_from_before_do_not_count() -> None:
    weight = nn.Parameter(torch.ones(10))
    weight.sum().backward()
    with LiveBytes([weight]) as tracker:
        weight.sum().backward()
        assert tracker.current == tracker.gradients == 0


# --- the whole ---------------------------------------------------------------------------------------------------

WIDTH, BATCH, DEPTH = 8, 512, 16
ACTIVATION = 4 * WIDTH * BATCH


def mlp() -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(DEPTH))


def end_to_end(blocks: nn.ModuleList, x: torch.Tensor) -> None:
    for block in blocks:
        x = block(x)
    x.sum().backward()


def locally(blocks: nn.ModuleList, x: torch.Tensor) -> None:
    for block in blocks:
        x = block(x.detach())
        x.sum().backward()


def test_local_backward_holds_one_block() -> None:
    blocks, x = mlp(), torch.randn(BATCH, WIDTH)
    whole = measure(lambda: end_to_end(blocks, x), blocks.parameters())
    blocks.zero_grad()
    local = measure(lambda: locally(blocks, x), blocks.parameters())
    # The 16 outputs, a gradient that comes in and one that goes out, the loss and its seed.
    assert whole.peak_activations == (DEPTH + 2) * ACTIVATION + 8
    # A block's input, its output and a gradient, the loss and its seed, whatever the depth.
    assert local.peak_activations == 3 * ACTIVATION + 8
    assert local.peak_total > local.peak_activations


def test_saved_bytes_of_one_block_are_a_sixteenth() -> None:
    blocks, x = mlp(), torch.randn(BATCH, WIDTH)

    def forward() -> torch.Tensor:
        h = x
        for block in blocks:
            h = block(h)
        return h

    parameters = list(blocks.parameters())
    _, whole = saved_storages(forward, [x, *parameters])
    _, one = saved_storages(lambda: blocks[0](x), [x, *parameters])
    assert sum(whole.values()) == DEPTH * sum(one.values()) == DEPTH * ACTIVATION


def test_nothing_is_left_when_everything_is_deleted() -> None:
    tracker = LiveBytes()
    with tracker:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(torch.randn(2, 3, 8, 8)), torch.tensor([1, 2]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    held = 4 * sum(p.numel() for p in model.parameters())
    steps = 4 * len(list(model.parameters()))
    assert tracker.current == 4 * held + steps + (2 * 4 * 4 + 8) + 4  # and buffers of BatchNorm, and the loss
    del model, optimizer, loss
    gc.collect()
    assert tracker.current == 0 and not tracker._seen


def test_neither_the_tracker_nor_the_tensors_keep_each_other_alive() -> None:
    x = torch.ones(3)
    with LiveBytes([nn.Parameter(torch.ones(3))]) as tracker:
        y = x + 1
    alive, tensor = weakref.ref(tracker), weakref.ref(y)
    del y
    assert tensor() is None
    z = x + 1
    del tracker
    assert alive() is None
    del z


def test_leaves_and_counts_on_after_an_exception() -> None:
    tracker = LiveBytes([nn.Parameter(torch.ones(3))])
    with pytest.raises(ZeroDivisionError), tracker:
        x = torch.ones(3)
        raise ZeroDivisionError
    y = torch.ones(3)
    assert tracker.current == 12 and y is not None
    del x
    assert tracker.current == 0


def test_measure() -> None:
    assert measure(lambda: None, ()) == Memory(0, 0, ())

    def step() -> torch.Tensor:
        return torch.ones(1) + torch.ones(2)

    assert measure(step, ()) == Memory(20, 20, ())
    assert measure(step, (), timeline=True) == Memory(20, 20, ((4, 0), (12, 0), (20, 0)))


# --- saved for backward ------------------------------------------------------------------------------------------


def test_saved_storages_by_hand() -> None:
    x, layer = torch.ones(4, 3), nn.Linear(3, 5)
    out, saved = saved_storages(lambda: layer(x).relu(), layer.parameters())
    assert saved == {x.untyped_storage()._cdata: 48, out.untyped_storage()._cdata: 80}
    out.sum().backward()  # the graph works as ever
    assert layer.weight.grad is not None
    _, saved = saved_storages(lambda: layer(x).relu(), [*layer.parameters(), x])
    assert list(saved.values()) == [80]


def test_saved_storages_counts_shared_ones_once_and_freed_ones_too() -> None:
    x = torch.ones(10, requires_grad=True)

    def function() -> torch.Tensor:
        for _ in range(3):
            x.exp().view(2, 5).t().square().sum().backward()  # exp saves its output; square saves a view of it
        return x

    _, saved = saved_storages(function)
    assert list(saved.values()) == [40, 40, 40]
    y, saved = saved_storages(lambda: x * x)
    assert saved == {x.untyped_storage()._cdata: 40} and y.grad_fn is not None


def test_saved_storages_leaves_no_cycle() -> None:
    x = torch.ones(10, requires_grad=True)
    out, _ = saved_storages(lambda: x.exp())
    storage = weakref.ref(out.untyped_storage())
    del out
    assert storage() is None


def test_saved_storages_of_fake_tensors() -> None:
    with FakeTensorMode():
        layer = nn.Linear(1000, 1000)
        x = torch.empty(10**6, 1000)  # 4 GB, if it were real
        out, saved = saved_storages(lambda: layer(x).relu(), layer.parameters())
        assert saved == {x.untyped_storage()._cdata: 4 * 10**9, out.untyped_storage()._cdata: 4 * 10**9}
