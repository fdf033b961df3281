"""What every exported method keeps, on a plain, a residual and a token model; no list of methods to edit."""

from __future__ import annotations

import copy
import gc
import inspect
import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import localgrad
from localgrad import heads, methods
from localgrad.measure.memory import LiveBytes, measure
from localgrad.spans import Local
from localgrad.testing import (
    assert_isolated,
    assert_lean,
    assert_method,
    assert_nothing_idle,
    assert_one_batchnorm_update,
    assert_resumable,
    assert_same_on_two_ranks,
    assert_transparent,
)
from zoo import BASES, METHODS, MODELS, REFUSED, TASK, PlainCNN, Residual, batch, build, is_base, steps, widest

EVERY = pytest.mark.parametrize("name", METHODS)
# TRGL needs residual branches: on a plain network it is refused, see tests/reference/test_trgl.py.
SUITED = [(name, model) for name in METHODS for model in MODELS if not (model == "cnn" and "trgl" in name)]
EVERYWHERE = pytest.mark.parametrize("name, model", SUITED)
ON_MAPS_AND_TOKENS = pytest.mark.parametrize("model", ["residual", "transformer"])


def train(network: localgrad.LocalNetwork, num_steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.05)
    inputs, targets = batch()
    for step in range(num_steps):
        for _, loss in localgrad.local_losses(network, inputs, targets, step):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        localgrad.exchange(network)


def test_the_registry_is_covered() -> None:
    applied = {name.partition("(")[0] for name in METHODS}
    assert applied == set(localgrad.methods.__all__)
    assert all(method.name == name for name, method in METHODS.items())


def test_windows_refuse_exactly_the_methods_that_are_not_local() -> None:
    refused = {base for plugin, base in REFUSED if plugin == "windows"}
    assert refused == {name for name, method in BASES.items() if not isinstance(method.spans, Local)}
    assert {"e2e", "deep_supervision"} <= refused
    for (_, base), message in REFUSED.items():
        assert base in message
    with pytest.raises(localgrad.MethodError, match=r"windows\(windows\(dgl\)\)"):
        localgrad.methods.windows(METHODS["windows(dgl)"])


@EVERY
def test_a_method_is_a_value(name: str) -> None:
    base = METHODS[name]
    plugins = [part for part in name.replace(")", "").split("(") if not is_base(part)]
    again = BASES[name.replace(")", "").split("(")[-1]]
    for plugin in reversed(plugins):
        again = getattr(localgrad.methods, plugin)(again)
    assert again == base and repr(again) == repr(base)


@EVERYWHERE
def test_isolation(name: str, model: str) -> None:
    network = build(model, METHODS[name], 4)
    # Weights that start at 0 pass no gradient on; nothing about isolation may rest on that.
    for parameter in network.auxiliary.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    before = copy.deepcopy(network.state_dict())
    for step in steps(network):
        assert_isolated(network, *batch(), step)
    after = network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None for p in network.parameters())


@EVERYWHERE
def test_transparency(name: str, model: str) -> None:
    torch.manual_seed(0)
    bare = MODELS[model]()
    untouched = copy.deepcopy(bare)
    inputs, _ = batch()
    network = localgrad.localize(bare, METHODS[name], 3, example=inputs[:2])
    assert all(m.training for m in network.modules())
    assert list(bare.state_dict()) == list(untouched.state_dict())
    for key, value in untouched.state_dict().items():
        assert torch.equal(bare.state_dict()[key], value), key
    assert type(bare) is type(untouched) and vars(bare).keys() == vars(untouched).keys()
    assert_transparent(bare, network, inputs)

    train(network)
    assert_transparent(bare, network, inputs)
    assert all(m.training for m in network.modules())
    # What was trained is the model: its weights in a model that never met the library give the same output.
    trained = {key: value.clone() for key, value in bare.state_dict().items()}
    assert list(trained) == list(untouched.state_dict())
    assert any(not torch.equal(value, untouched.state_dict()[key]) for key, value in trained.items())
    untouched.load_state_dict(trained)
    assert torch.equal(untouched.eval()(inputs), bare.eval()(inputs))
    assert torch.equal(untouched(inputs), network(inputs))


@pytest.mark.parametrize("name, model", [(name, model) for name, model in SUITED if model != "transformer"])
@pytest.mark.parametrize("num_blocks", [4])
def test_every_batchnorm_moves_once_and_as_in_a_plain_forward(name: str, model: str, num_blocks: int) -> None:
    method = METHODS[name]
    network = build(model, method, num_blocks, dropout=0.0)
    plain = copy.deepcopy(network.model)
    inputs, targets = batch()
    taken = steps(network)
    for step in taken:
        localgrad.backward(network, inputs, targets, step)
        for part in inputs.chunk(method.micro_batches):
            plain(part)
    for (path, found), expected in zip(network.model.named_modules(), plain.modules(), strict=True):
        if isinstance(found, nn.BatchNorm2d):
            assert found.num_batches_tracked == len(taken) * method.micro_batches, path
            assert torch.equal(found.running_mean, expected.running_mean), path
            assert torch.equal(found.running_var, expected.running_var), path


@EVERY
@ON_MAPS_AND_TOKENS
def test_nothing_is_idle(name: str, model: str) -> None:
    assert_nothing_idle(build(model, METHODS[name], 4), *batch())


@EVERY
@ON_MAPS_AND_TOKENS
def test_a_step_needs_what_its_spans_need(name: str, model: str) -> None:
    if not differentiates_twice(METHODS[name]):
        assert_lean(build(model, METHODS[name], 4), *batch())


@EVERY
def test_a_saved_network_goes_on_with_the_same_bits(name: str) -> None:
    assert_resumable(lambda: build("residual", METHODS[name], 4), *batch())


@EVERY
def test_no_graph_outlives_the_step(name: str) -> None:
    network = build("residual", METHODS[name], 4)
    inputs, targets = batch()
    for step in steps(network):
        localgrad.backward(network, inputs, targets, step)  # lazily made state exists from now on
        network.zero_grad(set_to_none=True)
        gc.collect()
        gc.disable()
        try:
            with LiveBytes(network.parameters()) as live:
                for _, loss in localgrad.local_losses(network, inputs, targets, step):
                    loss.backward()
                del loss
                assert live.gradients == sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
                assert live.current == live.gradients
                network.zero_grad(set_to_none=True)
                assert live.current == 0
        finally:
            gc.enable()


def measures(method: localgrad.Method) -> bool:
    """Whether it keeps what it measures inside blocks."""
    return method.name.startswith("trgl")


def differentiates_twice(method: localgrad.Method) -> bool:
    return method.name.startswith("sgr")


def activation_bytes(method: localgrad.Method, num_blocks: int) -> int:
    torch.manual_seed(0)
    inputs, targets = batch(8)
    model = PlainCNN(width=32, units=8)
    network = localgrad.localize(model, method, num_blocks, example=inputs)
    step = steps(network)[0]
    return measure(lambda: localgrad.backward(network, inputs, targets, step), network.parameters()).peak_activations


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if widest(method, 8) == 1 and not measures(method)]
)
def test_peak_activation_bytes_fall_with_the_number_of_blocks(name: str) -> None:
    peaks = [activation_bytes(METHODS[name], k) for k in (1, 2, 8)]
    assert peaks[0] > peaks[2] and (peaks[0] > peaks[1] > peaks[2] or differentiates_twice(METHODS[name])), peaks
    # A bridge of full resolution is a unit of the network more (published: 0.53), a second derivative keeps a second
    # graph of the block: of half the network more than end-to-end training keeps of the whole.
    if METHODS[name].bridge is None and not differentiates_twice(METHODS[name]):
        assert peaks[-1] < 0.5 * peaks[0], peaks


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if 1 < widest(method, 8) < 8])
def test_windows_cost_more_than_local_losses_and_less_than_all(name: str) -> None:
    assert activation_bytes(BASES["dgl"], 8) < activation_bytes(METHODS[name], 8) < activation_bytes(METHODS[name], 1)


def test_end_to_end_peak_does_not_depend_on_blocks_and_checkpointing_lowers_it() -> None:
    e2e, checkpointed = METHODS["e2e"], METHODS["checkpointing(e2e)"]
    peaks = {k: activation_bytes(e2e, k) for k in (1, 4, 8)}
    assert max(peaks.values()) - min(peaks.values()) <= 0.05 * peaks[1], peaks
    assert activation_bytes(checkpointed, 4) < 0.7 * peaks[4]
    assert activation_bytes(METHODS["accumulation(e2e)"], 1) < 0.4 * peaks[1]


@EVERY
@pytest.mark.parametrize("model", ["residual"])
def test_scaled_losses_give_gradients_scaled_exactly(name: str, model: str) -> None:
    """What a GradScaler relies on; by a power of two no rounding differs, as long as nothing underflows."""
    network = build(model, METHODS[name], 3).double()
    inputs, targets = batch()
    found = []
    for scale in (1.0, 1024.0):
        network.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        for _, loss in localgrad.local_losses(network, inputs.double(), targets):
            (loss * scale).backward()
        found.append({key: p.grad for key, p in network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        assert torch.equal(gradient * 1024.0, found[1][key]), key


@EVERY
@ON_MAPS_AND_TOKENS
def test_autocast_runs_and_is_close(name: str, model: str) -> None:
    network = build(model, METHODS[name], 3, dropout=0.0)
    for module in network.auxiliary.modules():  # BatchNorm over a few vectors makes much of a small difference
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    inputs, targets = batch(16)
    exact = localgrad.backward(network, inputs, targets)
    expected = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    dtypes = Counter()

    def note(span: localgrad.spans.Span, term: object, output: torch.Tensor) -> None:
        if term is None or term.scored:
            dtypes[output.dtype] += 1

    found = {}
    for span, loss in localgrad.local_losses(network, inputs, targets, autocast=torch.bfloat16, on_output=note):
        assert loss.dtype == torch.float32
        loss.backward()
        found[span] = found.get(span, 0.0) + loss.detach()
    assert dtypes.keys() == {torch.bfloat16}
    for span, loss in exact.items():
        assert abs(found[span] - loss) <= 0.05 * abs(loss) + 0.02, span
    for key in expected:
        parameter = network.get_parameter(key)
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, key
        assert parameter.grad.isfinite().all(), key
    a = torch.cat([g.flatten() for g in expected.values()])
    b = torch.cat([network.get_parameter(key).grad.flatten() for key in expected])
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.97


@EVERY
def test_evaluation_needs_no_backward_and_leaves_no_gradient(name: str) -> None:
    network = build("residual", METHODS[name], 3).eval()
    inputs, targets = batch()
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        losses = [(span, loss) for span, loss in localgrad.local_losses(network, inputs, targets)]
    assert not any(loss.requires_grad for _, loss in losses)
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    own = sum(loss for span, loss in losses if span.stop == 3 and span.start == losses[-1][0].start)
    weight = losses[-1][0].weight
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(network.model(inputs), targets)
    if METHODS[name].final_loss is None and not METHODS[name].rules:  # else the model minimises more than that
        torch.testing.assert_close(own / weight, expected)


@EVERY
def test_forgetting_backward_is_an_error(name: str) -> None:
    network = build("residual", METHODS[name], 3)
    with pytest.raises(localgrad.TrainingError, match=r"span \(0, \d\) was not back-propagated"):
        for _ in localgrad.local_losses(network, *batch()):
            pass
    first = True
    with pytest.raises(localgrad.TrainingError, match=r"was not back-propagated"):
        for _, loss in localgrad.local_losses(network, *batch()):
            if not first or (METHODS[name].micro_batches == 1 and len(network.spans(0)) == 1):
                break
            loss.backward()
            first = False
        else:
            pytest.fail("the second loss was never asked for")
        list(localgrad.local_losses(network, *batch()))


@EVERY
@ON_MAPS_AND_TOKENS
def test_on_block_done_comes_once_and_when_gradients_are_complete(name: str, model: str) -> None:
    num_blocks = 4
    network = build(model, METHODS[name], num_blocks)
    for step in steps(network):
        network.zero_grad(set_to_none=True)
        seen: dict[int, dict[int, torch.Tensor | None]] = {}
        order: list[int] = []

        def done(block: int, seen: Any = seen, order: Any = order) -> None:
            order.append(block)
            seen[block] = {id(p): None if p.grad is None else p.grad.clone() for p in network.block_parameters(block)}

        for _, loss in localgrad.local_losses(network, *batch(), step, on_block_done=done):
            loss.backward()
        assert sorted(order) == list(range(num_blocks))
        final = {id(p): p.grad for p in network.parameters()}
        for block, gradients in seen.items():
            for key, gradient in gradients.items():
                assert (gradient is None) == (final[key] is None), block
                assert gradient is None or torch.equal(gradient, final[key]), block
        if widest(METHODS[name], num_blocks) == 1:
            assert order == list(range(num_blocks))
        elif all(span.start == 0 for span in network.spans(step)):
            assert order == list(reversed(range(num_blocks)))


@EVERY
@ON_MAPS_AND_TOKENS
def test_local_outputs_are_what_the_heads_say(name: str, model: str) -> None:
    num_blocks = 4
    network = build(model, METHODS[name], num_blocks)
    train(network, 1)
    network.eval()
    inputs, _ = batch()
    found = list(localgrad.local_outputs(network, inputs))
    assert not any(output.requires_grad for _, _, output in found)
    with torch.no_grad():
        expected = []
        for boundary, features in enumerate(localgrad.features(network, inputs), start=1):
            for key, auxiliary in network.auxiliary.items():
                start, stop = map(int, key.split("-"))
                if stop == boundary:
                    seen = features if auxiliary.bridge is None else auxiliary.bridge(features)
                    heads = zip(auxiliary.terms, auxiliary.heads, strict=True)
                    expected += [(start, stop, term, head(seen)) for (term, _), head in heads]
    *local, (own, term, output) = found
    assert term is None and own.stop == num_blocks and torch.equal(output, network.model(inputs))
    assert len(local) == len(expected)
    for (span, term, output), (start, stop, expected_term, value) in zip(local, expected, strict=True):
        assert (span.start, span.stop, term) == (start, stop, expected_term)
        assert torch.equal(output, value)
        if term.scored:
            assert TASK.score(output, batch()[1]).shape == (8,)


def test_the_asserts_can_fail() -> None:
    torch.manual_seed(0)
    bare = Residual()
    inputs, targets = batch()
    network = localgrad.localize(bare, METHODS["dgl"], 3, example=inputs[:2])

    bare.stranger = network.auxiliary["0-1"]
    with pytest.raises(AssertionError, match="state_dict contains auxiliary tensors"):
        assert_transparent(bare, network, inputs)
    del bare.stranger
    with pytest.raises(AssertionError, match="another model"):
        assert_transparent(copy.deepcopy(bare), network, inputs)

    # A loss that reads the first block's weights trains more than its span.
    leak = network.model.stem[0].weight

    def leaking(output: torch.Tensor, given: localgrad.Batch) -> torch.Tensor:
        return TASK.loss(output, given) + leak.square().sum()

    method = METHODS["dgl"]
    leaky = replace(method, terms=(replace(method.terms[0], loss=leaking),))
    network = localgrad.localize(bare, leaky, 3, example=inputs[:2])
    with pytest.raises(localgrad.PartitionError, match=r"span \(1, 2\) reads .stem.0.weight. of block 0"):
        assert_isolated(network, inputs, targets)

    # A head with a layer that nothing reads allocates what never learns.
    network = localgrad.localize(bare, method, 3, example=inputs[:2])
    network.auxiliary["0-1"].unused = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match=r"\(0, 1\) alone gave no gradient to auxiliary.0-1.unused.weight"):
        assert_isolated(network, inputs, targets)


def of_mlaan() -> localgrad.LocalNetwork:
    return build("residual", METHODS["mlaan(dgl)"], 4)


def of_other_weights() -> localgrad.LocalNetwork:
    """In the processes that are started, other weights than here."""
    return build("residual", METHODS["dgl"], 2, seed=int(multiprocessing.parent_process() is None))


def test_two_ranks_end_as_one_process_does() -> None:
    assert_same_on_two_ranks(of_mlaan, *batch())


def test_the_other_asserts_can_fail() -> None:
    network = build("residual", METHODS["man(dgl)"], 3)
    network.auxiliary["0-1"].unused = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match=r"no loss of man\(dgl\) gives a gradient to auxiliary.0-1.unused.weight"):
        assert_nothing_idle(network, *batch())
    network.auxiliary["0-1"].unused.requires_grad_(False)
    with pytest.raises(AssertionError, match=r"neither a loss nor an exchange .* moves auxiliary.0-1.unused.bias"):
        assert_nothing_idle(network, *batch())

    network = build("residual", METHODS["dgl"], 3)
    layer = next(m for m in network.model.modules() if isinstance(m, nn.BatchNorm2d))

    def counts_again(module: nn.BatchNorm2d, *_: object) -> None:
        module.num_batches_tracked += 1

    layer.register_forward_hook(counts_again)
    with pytest.raises(AssertionError, match="moved 2 times in a step of 1 micro-batches"):
        assert_one_batchnorm_update(network, *batch())

    kept: list[torch.Tensor] = []

    def keeping(output: torch.Tensor, given: localgrad.Batch) -> torch.Tensor:
        kept.append(torch.zeros(10**6))
        return TASK.loss(output, given)

    hoarding = replace(METHODS["dgl"], terms=(replace(METHODS["dgl"].terms[0], loss=keeping),))
    with pytest.raises(AssertionError, match="bytes are alive at the peak of step 0; its spans need"):
        assert_lean(build("residual", hoarding, 4), *batch())

    seeds = iter(range(9))
    with pytest.raises(AssertionError, match="a resumed run ended with another"):
        assert_resumable(lambda: build("residual", METHODS["man(dgl)"], 3, seed=next(seeds)), *batch())
    with pytest.raises(AssertionError, match="two ranks ended with another"):
        assert_same_on_two_ranks(of_other_weights, *batch())
    with pytest.raises(AssertionError, match=r"\(0, 1\) alone gave no gradient to auxiliary"):
        assert_method(lambda task: methods.dgl(task, head=Wasteful))


class Wasteful(nn.Module):
    """A head with a layer that nothing reads."""

    def __init__(self, site: localgrad.Site) -> None:
        super().__init__()
        self.head, self.unused = heads.Linear(3)(site), nn.Linear(2, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features)


@pytest.mark.parametrize("name", methods.__all__)
def test_what_a_method_cannot_be_made_from_is_answered(name: str) -> None:
    """A base of a number or a method, a plug-in of a task or on itself: which it is, and what to write."""
    make = getattr(methods, name)
    task = localgrad.tasks.classification(10)
    if next(iter(inspect.signature(make).parameters)) == "task":
        for wrong in (10, None, methods.dgl(task)):
            with pytest.raises(localgrad.MethodError, match=rf"{name} is a base and takes a task; write {name}\(tasks"):
                make(wrong)
        return
    for wrong in (10, None, task):
        with pytest.raises(localgrad.MethodError, match=rf"{name} is a plug-in and takes a method; write {name}\(dgl"):
            make(wrong)
    if name != "checkpointing":
        with pytest.raises(localgrad.MethodError, match=f"{name} is part of it already"):
            make(make(methods.dgl(task)))


def test_print_shows_what_differs_and_repr_is_exact() -> None:
    task = localgrad.tasks.classification(10)
    method = methods.pgl(methods.man(methods.infopro(task)))
    shown = str(method)
    assert len(shown) <= 300 and len(shown.splitlines()) > 4 and "bound method" not in shown
    assert shown in (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    assert "decay" not in shown and "decay=0.9" in str(methods.man(methods.dgl(task), decay=0.9))
    assert "decay=0.995" in repr(method)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_prints_a_term_a_line(name: str) -> None:
    lines = str(METHODS[name]).splitlines()
    assert lines[0] == METHODS[name].name and sum(line.startswith("  term") for line in lines) == len(
        METHODS[name].terms
    )
    assert not any("<" in line or " at 0x" in line for line in lines)
