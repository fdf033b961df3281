"""The step from the caller's side; what holds for every method is in tests/contract."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import localgrad
from localgrad.errors import PartitionError, TrainingError
from localgrad.measure.memory import LiveBytes
from localgrad.methods import accumulation, deep_supervision, dgl, e2e, infopro, windows
from localgrad.spans import Constant, Span

TASK = localgrad.tasks.classification(3)


def mlp(width: int = 8, layers: int = 3, inplace: bool = False) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Sequential(nn.Linear(4, width), nn.ReLU(inplace))]
    parts += [nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace)) for _ in range(layers - 2)]
    return nn.Sequential(*parts, nn.Linear(width, 3))


def data(size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 4, generator=generator), torch.arange(size) % 3


def network(method: localgrad.Method, layers: int = 3) -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    return localgrad.localize(mlp(layers=layers), method, layers, example=data(2)[0])


def test_losses_come_in_order_of_the_boundary_and_as_soon_as_it_is_reached() -> None:
    net = network(windows(dgl(TASK)), 4)
    ran: list[int] = []
    for index, unit in enumerate(net.model):
        unit.register_forward_hook(lambda *_, index=index: ran.append(index))
    order = []
    for span, loss in localgrad.local_losses(net, *data()):
        assert ran == list(range(span.stop))
        order.append((span.start, span.stop))
        loss.backward()
    assert order == [(0, 1), (1, 2), (0, 2), (2, 3), (1, 3), (3, 4), (2, 4)]


def test_a_loss_is_the_weighted_sum_of_its_terms() -> None:
    images, targets = torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(256, 3)),
    )
    method = windows(infopro(TASK, image=(5.0, 0.5), label=(0.5, 1.0)), width=2, local=0.25, cascade=3.0)
    net = localgrad.localize(model, method, 3, example=images[:2])
    outputs: dict[Span, list[tuple[object, Tensor]]] = {}

    def note(span: Span, term: object, output: Tensor) -> None:
        assert not output.requires_grad
        outputs.setdefault(span, []).append((term, output))

    batch = localgrad.Batch(images, targets, 4)
    expected_weights = {(0, 1): (0.5, 5.0), (1, 2): (1.0, 0.5), (0, 2): (1.0, 0.5)}
    for span, loss in localgrad.local_losses(net, images, targets, 4, on_output=note):
        loss.backward()
        (term, output), *rest = outputs[span]
        if span.stop == 3:
            assert term is None and not rest
            assert torch.equal(loss, TASK.loss(output, batch) * span.weight)
        else:
            weights = expected_weights[span.start, span.stop]
            total = sum(w * t.loss(out, batch) for w, (t, out) in zip(weights, outputs[span], strict=True))
            torch.testing.assert_close(loss, span.weight * total)
        assert span.weight == (0.25 if span.stop - span.start == 1 else 3.0)


def test_losses_see_the_micro_batch_and_the_step() -> None:
    seen = []

    @dataclass(frozen=True)
    class Watching:
        num_outputs: int = 3

        def head(self, proposed: localgrad.site.HeadBuilder) -> localgrad.site.HeadBuilder:
            return proposed

        def loss(self, output: Tensor, batch: localgrad.Batch) -> Tensor:
            seen.append((len(batch.inputs), len(batch.targets), batch.step))
            return output.square().mean()

    method = accumulation(dgl(Watching()), parts=2)
    localgrad.backward(network(method), *data(5), 7)
    assert seen == [(2, 2, 7), (3, 3, 7)] * 3  # all parts pass a block before the next one begins


def test_backward_returns_detached_losses_summed_over_micro_batches() -> None:
    net = network(accumulation(e2e(TASK), parts=3))
    x, y = data()
    found = localgrad.backward(net, x, y)
    torch.testing.assert_close(found[Span(0, 3)], nn.functional.cross_entropy(net.model(x), y).detach())
    assert not found[Span(0, 3)].requires_grad
    assert found.keys() == set(net.spans(0))


def test_schedules_may_change_with_the_step() -> None:
    @dataclass(frozen=True)
    class Alternating:
        def __call__(self, num_blocks: int, step: int) -> tuple[Span, ...]:
            return self.patterns(num_blocks)[step % 2]

        def patterns(self, num_blocks: int) -> tuple[tuple[Span, ...], ...]:
            local = tuple(Span(k, k + 1) for k in range(num_blocks))
            return local, (Span(0, num_blocks),)

    net = network(replace(dgl(TASK), spans=Alternating()))
    assert set(net.auxiliary) == {"0-1", "1-2"}
    for step in range(4):
        net.zero_grad(set_to_none=True)
        found = localgrad.backward(net, *data(), step)
        assert len(found) == (3, 1)[step % 2]
        heads = [p.grad is not None for p in net.auxiliary.parameters()]
        assert all(heads) if step % 2 == 0 else not any(heads)


def test_models_with_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(2, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(x) + self.b(y)))

    torch.manual_seed(0)
    model = Two()
    plain = copy.deepcopy(model)
    x, z, y = torch.randn(6, 4), torch.randn(6, 2), torch.arange(6) % 3
    net = localgrad.localize(model, accumulation(e2e(TASK), parts=2), ("c",), example=(x[:2], z[:2]))
    localgrad.backward(net, (x, z), y)
    for part in (slice(0, 3), slice(3, 6)):
        (nn.functional.cross_entropy(plain(x[part], z[part]), y[part]) * 0.5).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_the_gradient_of_the_inputs_is_that_of_plain_backward() -> None:
    net = network(e2e(TASK))
    x, y = data()
    x.requires_grad_()
    localgrad.backward(net, x, y)
    found, x.grad = x.grad, None
    nn.functional.cross_entropy(net.model(x), y).backward()
    assert torch.equal(found, x.grad)


def test_a_block_that_overwrites_its_input() -> None:
    def chain() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(4, 8), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), nn.Linear(8, 3)]

    parts = chain()
    with pytest.raises(PartitionError, match=r"'steps.1' overwrites the features.*inplace=False"):
        localgrad.localize(nn.Sequential(*parts), windows(dgl(TASK)), parts, example=data(2)[0])

    # Without a span across the boundary nobody needs what is overwritten.
    parts = chain()
    net = localgrad.localize(nn.Sequential(*parts), dgl(TASK), parts, example=data(2)[0])
    localgrad.backward(net, *data())
    other = chain()
    other[1][0] = nn.ReLU()
    safe = localgrad.localize(nn.Sequential(*other), dgl(TASK), other, example=data(2)[0])
    safe.load_state_dict(net.state_dict())
    localgrad.backward(safe, *data())
    for p, q in zip(net.parameters(), safe.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_other_errors_of_a_block_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        localgrad.backward(network(dgl(TASK)), torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))


def test_forgetting_one_loss_of_a_window_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"span \(0, 2\) was not back-propagated: call loss.backward\(\)"):
        for span, loss in localgrad.local_losses(network(windows(dgl(TASK))), *data()):
            if span != Span(0, 2):
                loss.backward()


def test_a_loss_may_be_left_out_by_multiplying_it_with_0() -> None:
    net = network(dgl(TASK))
    for span, loss in localgrad.local_losses(net, *data()):
        (loss * (span.start == 1)).backward()
    nonzero = [any(p.grad.any() for p in net.parameters_of(k)) for k in range(3)]
    assert nonzero == [False, True, False]


def test_a_zip_that_asks_others_first_is_told_of() -> None:
    """It never comes back for the way of the last loss."""
    net, weights = network(dgl(TASK)), [1.0, 1.0, 1.0]
    for _, (_, loss) in zip(weights, localgrad.local_losses(net, *data()), strict=True):
        loss.backward()
    assert all(p.grad is not None for k in range(3) for p in net.parameters_of(k))  # strict asks once more
    net.zero_grad(set_to_none=True)
    with pytest.warns(UserWarning, match="put local_losses first"):
        for _, (_, loss) in zip(weights, localgrad.local_losses(net, *data())):  # noqa: B905
            loss.backward()
    assert all(p.grad is None for p in net.parameters_of(2))
    for (_, loss), _ in zip(localgrad.local_losses(net, *data()), weights):  # noqa: B905
        loss.backward()
    assert all(p.grad is not None for p in net.parameters_of(2))


def test_stopping_early_leaves_nothing_behind() -> None:
    net = network(windows(dgl(TASK)))
    with LiveBytes(net.parameters()) as live:
        with pytest.warns(UserWarning, match=r"of span \(0, 1\) was carried into its block"):
            for _, loss in localgrad.local_losses(net, *data()):
                loss.backward()
                break
            del loss
        gc.collect()
        assert live.current == live.gradients
    net.zero_grad(set_to_none=True)
    localgrad.backward(net, *data())
    expected = [p.grad for p in net.parameters()]
    again = network(windows(dgl(TASK)))
    localgrad.backward(again, *data())
    assert all(torch.equal(p.grad, q) for p, q in zip(again.parameters(), expected, strict=True))


@dataclass(frozen=True)
class Fixed(Constant):
    pairs: tuple[tuple[int, int], ...]

    def spans(self, num_blocks: int) -> tuple[Span, ...]:
        return tuple(Span(*pair) for pair in self.pairs)


class Witness:
    """Held by a node of the graph, and by nothing else."""

    def __call__(self, inputs: object, outputs: object) -> None:
        pass


@pytest.mark.parametrize(
    "pairs, alive",
    [
        (((0, 1), (1, 2), (2, 3), (3, 4)), [1, 1, 1, 1]),
        (((0, 4),), [4]),
        (((0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4)), [1, 2, 2, 2, 2, 2, 2]),
        (((0, 2), (2, 4)), [2, 2]),
        (((0, 1), (1, 4)), [1, 3]),
    ],
)
def test_as_many_blocks_are_held_as_a_span_still_needs(pairs: tuple[tuple[int, int], ...], alive: list[int]) -> None:
    """Counts the graphs of blocks that live while the caller holds each loss."""
    net = network(replace(dgl(TASK), spans=Fixed(pairs)), 4)
    outputs: list[weakref.ref[Witness]] = []

    def watch(module: nn.Module, args: object, output: Tensor) -> None:
        witness = Witness()
        output.grad_fn.register_hook(witness)
        outputs.append(weakref.ref(witness))

    for unit in net.model:
        unit.register_forward_hook(watch)
    found = []
    gc.disable()
    try:
        for _, loss in localgrad.local_losses(net, *data()):
            found.append(sum(ref() is not None for ref in outputs))
            loss.backward()
        del loss
        assert not any(ref() is not None for ref in outputs)
    finally:
        gc.enable()
    assert found == alive


def test_on_block_done_with_micro_batches_comes_in_the_last_one_only() -> None:
    net = network(accumulation(deep_supervision(TASK), parts=3))
    done: list[int] = []
    seen = 0
    for _, loss in localgrad.local_losses(net, *data(), on_block_done=done.append):
        assert not done
        seen += 1
        loss.backward()
    assert seen == 9 and done == [2, 1, 0]


def test_on_block_done_with_windows_follows_the_last_span_of_each_block() -> None:
    net = network(windows(dgl(TASK)), 4)
    events: list[object] = []
    for span, loss in localgrad.local_losses(net, *data(), on_block_done=events.append):
        events.append(str(span))
        loss.backward()
    assert events == ["(0, 1)", "(1, 2)", "(0, 2)", 0, "(2, 3)", "(1, 3)", 1, "(3, 4)", "(2, 4)", 3, 2]


def test_local_outputs_in_training_mode_run_each_block_once() -> None:
    net = network(windows(dgl(TASK)))
    found = list(localgrad.local_outputs(net, data()[0]))
    assert [(span.start, span.stop) for span, _, _ in found] == [(0, 1), (0, 2), (1, 2), (1, 3)]
    assert [term is None for _, term, _ in found] == [False, False, False, True]
    assert all(output.shape == (12, 3) for _, _, output in found)


def test_scored_only_leaves_decoders_out_and_changes_no_score() -> None:
    task = localgrad.tasks.classification(4, mean=(0.5,) * 3, std=(0.25,) * 3)
    images = torch.randn(4, 3, 16, 16)
    network = localgrad.localize(localgrad.models.resnet8(4), localgrad.methods.infopro(task), 3, example=images).eval()
    everything = list(localgrad.local_outputs(network, images))
    scored = list(localgrad.local_outputs(network, images, scored_only=True))
    assert len(everything) == 5 and len(scored) == 3
    kept = [output for _, term, output in everything if term is None or term.scored]
    assert all(torch.equal(a, b) for a, (_, _, b) in zip(kept, scored, strict=True))
