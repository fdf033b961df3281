"""One block on the device gives the bits of a network that is whole there, and holds the bytes of one block.

Here the device is a second place on the CPU: every tensor of a block is copied there and back.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import localgrad
from localgrad.measure.memory import LiveBytes
from localgrad.method import Accumulate, Method
from zoo import METHODS, batch, build, steps

BLOCKS = 4
EVERY = pytest.mark.parametrize("name", METHODS)
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, 1e-2),
}


def in_parts(method: Method, parts: int) -> Method:
    return replace(method, accumulate=Accumulate(parts))


class Run:
    """A network, an optimizer for each block, and what the steps so far have shown."""

    def __init__(self, network: localgrad.LocalNetwork, make: Make, clip: float | None = None) -> None:
        self.network, self.clip = network, clip
        self.optimizers = [make(network.block_parameters(k)) for k in range(network.num_blocks)]
        self.losses: list[Tensor] = []

    def done(self, block: int) -> None:
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.network.block_parameters(block), self.clip)
        self.optimizers[block].step()
        self.optimizers[block].zero_grad(set_to_none=True)

    def step(self, number: int, size: int = 8) -> None:
        inputs, targets = batch(size, seed=number)
        with localgrad.keyed_randomness(0):
            for _, loss in localgrad.local_losses(self.network, inputs, targets, number, on_block_done=self.done):
                loss.backward()
                self.losses.append(loss.detach())
            localgrad.exchange(self.network)

    def state(self) -> dict[str, Tensor]:
        found = dict(self.network.state_dict())
        for k, optimizer in enumerate(self.optimizers):
            for p, state in optimizer.state_dict()["state"].items():
                found |= {f"{k}.{p}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        return found | {f"loss {k}": loss for k, loss in enumerate(self.losses)}


def assert_same(found: Run, expected: Run) -> None:
    a, b = found.state(), expected.state()
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert torch.equal(a[name], value), name


def pair(method: Method, make: Make, model: str = "residual", clip: float | None = None, ahead: int = 1) -> list[Run]:
    runs = [Run(build(model, method, BLOCKS), make, clip) for _ in range(2)]
    localgrad.resident(runs[0].network, "cpu", ahead=ahead)
    return runs


@pytest.mark.parametrize("parts, optimizer", [(1, "sgd"), (1, "adafactor"), (4, "adamw"), (16, "sgd"), (16, "adamw")])
def test_same_bits_with_micro_batches(parts: int, optimizer: str) -> None:
    ours, plain = pair(in_parts(METHODS["dgl"], parts), OPTIMIZERS[optimizer], "transformer")
    for run in (ours, plain):
        for number in range(2):
            run.step(number, size=2 * parts + 2)
    assert_same(ours, plain)


class Apart(TorchDispatchMode):
    """Refuses every operation on what is at home, but copies: on a GPU it would lie on another device."""

    def __init__(self, residence: localgrad.Residence, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.residence, self.copying = residence, False
        blocks = range(residence.network.num_blocks)
        self.homes = {t.untyped_storage()._cdata for k in blocks for t in residence.tensors_of(k)}
        whole = residence._copying

        @contextlib.contextmanager
        def copying() -> Iterator[None]:
            self.copying = True
            with whole():
                yield
            self.copying = False

        monkeypatch.setattr(residence, "_copying", copying)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.copying and func not in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    assert tensor.untyped_storage()._cdata not in self.homes, f"{func} on what is at home"
        return func(*args, **kwargs)


@EVERY
def test_every_method_computes_with_what_is_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(build("residual", METHODS[name], BLOCKS), OPTIMIZERS["adamw"], clip=0.5)
    residence = localgrad.resident(run.network, "cpu")
    for number in steps(run.network):
        run.step(number)
    with torch.no_grad(), Apart(residence, monkeypatch):
        list(localgrad.local_outputs(run.network, batch()[0]))
        run.network(batch()[0])
    for number in steps(run.network):
        with Apart(residence, monkeypatch):
            for _, loss in localgrad.local_losses(run.network, *batch(), number, on_block_done=run.done):
                loss.backward()
        localgrad.exchange(run.network)


def test_what_is_read_at_home_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("residual", METHODS["dgl"], BLOCKS)
    residence = localgrad.resident(network, "cpu")
    last = network.model.fc.weight
    network.model.stage1[0].register_forward_hook(lambda *_: last.sum())
    with pytest.raises(AssertionError, match="at home"), Apart(residence, monkeypatch):
        localgrad.backward(network, *batch())


class Skipping(nn.Module):
    """Layers, one of which rests in every other call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.calls = -1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        for k, layer in enumerate(self.layers):
            if k != 1 or self.calls % 2 == 0:
                x = torch.tanh(layer(x))
        return x


def test_a_forward_that_skips_a_cut_has_the_blocks_it_joins() -> None:
    x, y = torch.randn(4, 8), torch.arange(4)
    task = localgrad.tasks.classification(8)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        network = localgrad.localize(
            Skipping(), localgrad.methods.dgl(task), ("layers.1", "layers.2", "layers.3"), example=x
        )
        network.model.calls = -1
        runs.append(Run(network, OPTIMIZERS["sgd"]))
    residence = localgrad.resident(runs[0].network, "cpu", ahead=0)
    for run in runs:
        for number in range(4):
            for _, loss in localgrad.local_losses(run.network, x, y, number, on_block_done=run.done):
                loss.backward()
                run.losses.append(loss.detach())
    assert residence.here == 0
    assert_same(*runs)


@EVERY
def test_same_bits_with_every_method(name: str) -> None:
    parts = METHODS[name].micro_batches
    method = METHODS[name] if parts > 1 else in_parts(METHODS[name], 2)
    ours, plain = pair(method, OPTIMIZERS["adamw"], clip=0.5)
    for number in (*steps(ours.network), 1):
        for run in (ours, plain):
            run.step(number)
    assert_same(ours, plain)


def bytes_of(network: localgrad.LocalNetwork, block: int) -> int:
    return sum(p.nbytes for p in network.block_parameters(block))


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_device_holds_the_blocks_that_run_and_come(ahead: int) -> None:
    """AdamW: weights and two of state of each block here, and the gradients of the one that runs."""
    torch.manual_seed(0)
    width, depth = 64, 6
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(depth)))
    task = localgrad.tasks.classification(width)
    method = localgrad.methods.accumulation(localgrad.methods.dgl(task, head="linear"), parts=4)
    x, y = torch.randn(8, width), torch.randint(width, (8,))
    network = localgrad.localize(model, method, depth, example=x)
    run = Run(network, OPTIMIZERS["adamw"])
    residence = localgrad.resident(network, "cpu", ahead=ahead)
    assert not residence.kept
    block = max(bytes_of(network, k) for k in range(depth))

    def step() -> None:
        for _, loss in localgrad.local_losses(network, x, y, on_block_done=run.done):
            loss.backward()

    step()
    with LiveBytes() as device:
        step()
    assert device.current < 8 * width * 4 * 4  # nothing stays but the last features
    blocks = device.peak / block
    # While it steps AdamW holds three copies of a tensor besides, half a block each; features wait.
    assert 3 * (1 + ahead) + 1 <= blocks <= 3 * (1 + ahead) + 1 + 3 / 2 + 0.1


def weights(network: localgrad.LocalNetwork) -> dict[str, Tensor]:
    return copy.deepcopy(dict(network.state_dict()))


@pytest.mark.parametrize("model", ["residual", "transformer"])
def test_evaluation_fetches_block_by_block(model: str) -> None:
    """A plain forward of the model, of the network, and what every head answers; buffers of BatchNorm too."""
    ours, plain = pair(METHODS["man(dgl)"], OPTIMIZERS["sgd"], model)
    inputs, _ = batch()
    largest = max(sum(t.nbytes for t in ours.network.residence.tensors_of(k)) for k in range(BLOCKS))
    for training in (True, False):
        found = []
        for run in (ours, plain):
            run.network.train(training)
            with torch.no_grad(), localgrad.keyed_randomness(0), LiveBytes() as device:
                torch.manual_seed(0)
                outputs = [run.network(inputs), run.network.model(inputs)]
                outputs += [output for *_, output in localgrad.local_outputs(run.network, inputs)]
                outputs += list(localgrad.features(run.network, inputs))
            found.append([*outputs, *run.network.state_dict().values()])
            if run is ours:
                assert 0 < device.current < sum(o.nbytes for o in outputs) + largest
        assert len(found[0]) == len(found[1])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
    with torch.inference_mode():
        assert torch.equal(ours.network(inputs), plain.network(inputs))
    for run in (ours, plain):
        run.network.train()
        run.step(1)
    assert_same(ours, plain)


class Killed(Exception):
    pass


@pytest.mark.parametrize("name, parts", [("dgl", 2), ("local_critic", 1), ("mlaan(dgl)", 1)])
def test_a_step_that_breaks_off_leaves_everything_whole(name: str, parts: int) -> None:
    """At any loss or block done: the same weights as without residence then, and it goes on from what was saved."""
    method = in_parts(METHODS[name], parts)
    events = 0

    def broken(run: Run, at: int) -> None:
        nonlocal events
        events = 0

        def tick(*_: object) -> None:
            nonlocal events
            events += 1
            if events == at:
                raise Killed

        def done(block: int) -> None:
            run.done(block)
            tick()

        losses = localgrad.local_losses(run.network, *batch(), 1, on_output=tick, on_block_done=done)
        with localgrad.keyed_randomness(0):
            for _, loss in losses:
                loss.backward()

    saved: list[tuple[dict[str, Tensor], list[dict]]] = []
    runs = pair(method, OPTIMIZERS["adamw"])
    for run in runs:
        run.step(0)
        saved.append((weights(run.network), [copy.deepcopy(o.state_dict()) for o in run.optimizers]))
    at = 0
    while at == 0 or events == at:
        at += 1
        for run in runs:
            with contextlib.suppress(Killed):
                broken(run, at)
        assert_same(*runs)
        for run, (state, optimizers) in zip(runs, saved, strict=True):
            run.network.load_state_dict(state)
            run.network.zero_grad(set_to_none=True)
            for optimizer, one in zip(run.optimizers, optimizers, strict=True):
                optimizer.load_state_dict(copy.deepcopy(one))
    assert at > 2 * BLOCKS
    fresh = Run(build("residual", method, BLOCKS), OPTIMIZERS["adamw"])
    localgrad.resident(fresh.network, "cpu")
    fresh.network.load_state_dict(saved[0][0])
    for optimizer, one in zip(fresh.optimizers, saved[0][1], strict=True):
        optimizer.load_state_dict(one)
    fresh.losses = list(runs[1].losses)
    for run in (fresh, runs[1]):
        run.step(1)
    assert_same(fresh, runs[1])


def test_gradients_that_nobody_takes_go_home() -> None:
    """Steps add up, and an optimizer that steps at the end does so on the host."""
    ours, plain = pair(METHODS["dgl"], OPTIMIZERS["sgd"])
    for run in (ours, plain):
        with localgrad.keyed_randomness(0):
            for seed in (0, 1):
                localgrad.backward(run.network, *batch(seed=seed))
    for (name, p), q in zip(ours.network.named_parameters(), plain.network.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    for run in (ours, plain):
        for k in range(BLOCKS):
            run.done(k)
        run.step(2)
    assert_same(ours, plain)


def test_a_copy_of_a_network_has_a_residence_of_its_own() -> None:
    ours, plain = pair(METHODS["man(dgl)"], OPTIMIZERS["sgd"])
    inputs, _ = batch()
    other = copy.deepcopy(ours.network)
    assert other.residence is not ours.network.residence and other.residence.network is other
    ours.step(0)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(0.5)
        for parameter in plain.network.model.parameters():
            parameter.mul_(0.5)
        other.eval(), plain.network.eval()
        assert torch.equal(other(inputs), plain.network(inputs))


class Tied(nn.Module):
    """Tokens embedded and read out by one matrix; a scale that the whole reads at its end; a buffer of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        turns = torch.linspace(-1, 1, 8)
        for layer in self.layers:
            layer.register_buffer("turns", turns)
        self.read_out = nn.Linear(8, 16, bias=False)
        self.read_out.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * layer.turns
        return self.read_out(x * self.scale)


@pytest.mark.parametrize("read_out", ["own", "shared"])
def test_what_several_blocks_read_stays(read_out: str) -> None:
    task = localgrad.tasks.language_model(16, read_out=read_out)
    tokens = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(0))
    runs = []
    for kind in range(2):
        torch.manual_seed(0)
        model = Tied()
        network = localgrad.localize(
            model, localgrad.methods.dgl(task), ("layers.1", "layers.2"), example=tokens, shared=True
        )
        runs.append(Run(network, OPTIMIZERS["adamw"]))
        if kind == 0:
            localgrad.resident(network, "cpu")
            kept = {id(t) for t in network.residence.kept}
            assert kept == {id(model.embedding.weight), id(model.scale), id(model.layers[0].turns)}
    for run in runs:
        for number in range(2):
            for _, loss in localgrad.local_losses(run.network, tokens, tokens, number, on_block_done=run.done):
                loss.backward()
    assert_same(*runs)


def test_a_matrix_that_heads_read_besides_stays() -> None:
    task = localgrad.tasks.language_model(16, read_out="shared")
    tokens = torch.zeros(4, 6, dtype=torch.long)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False))
    network = localgrad.localize(model, localgrad.methods.dgl(task), ("1", "2"), example=tokens)
    assert [id(t) for t in localgrad.resident(network, "cpu").kept] == [id(model[3].weight)]


def test_ending_it() -> None:
    ours, plain = pair(METHODS["dgl"], OPTIMIZERS["sgd"])
    for run in (ours, plain):
        run.step(0)
    ours.network.residence.end()
    assert ours.network.residence is None
    localgrad.testing.assert_transparent(ours.network.model, ours.network, batch()[0])
    for run in (ours, plain):
        run.step(1)
    assert_same(ours, plain)


def test_refusals() -> None:
    network = build("residual", METHODS["dgl"], BLOCKS)
    with pytest.raises(localgrad.TrainingError, match="to cuda, or to cpu"):
        localgrad.resident(network, "meta")
    with pytest.raises(localgrad.TrainingError, match="at least 0"):
        localgrad.resident(network, "cpu", ahead=-1)
    with pytest.raises(localgrad.TrainingError, match="no model and no wrapper"):
        localgrad.resident(network.model, "cpu")
    localgrad.resident(network, "cpu")
    with pytest.raises(localgrad.TrainingError, match="resident already"):
        localgrad.resident(network, "cpu")
    with pytest.raises(localgrad.TrainingError, match="forward with gradients"):
        network(batch()[0])
    with pytest.raises(localgrad.MethodError, match="resident network"):
        network.compile_blocks()
    with pytest.raises(localgrad.TrainingError, match="gradients of all blocks"):
        localgrad.loss(network, *batch())
    aliased = build("residual", METHODS["dgl"], BLOCKS)
    units = aliased.model.stage1
    units[1].conv1.weight.data = units[0].conv1.weight.data
    with pytest.raises(localgrad.TrainingError, match=r"stage1\.0\.conv1\.weight.*same memory"):
        localgrad.resident(aliased, "cpu")
    compiled = build("residual", METHODS["dgl"], BLOCKS)
    compiled.compile_blocks()
    with pytest.raises(localgrad.TrainingError, match="compiler"):
        localgrad.resident(compiled, "cpu")


@pytest.mark.parametrize("wait", ["host", "bf16"])
def test_same_bits_where_features_wait_on_the_host(wait: str) -> None:
    ours, plain = pair(replace(METHODS["dgl"], accumulate=Accumulate(2, wait)), OPTIMIZERS["sgd"])
    for run in (ours, plain):
        run.step(0)
    assert_same(ours, plain)


def test_frozen_weights_come_and_are_not_written_back() -> None:
    """Adapters train in autocast; what does not change is not copied back, what a hook changes is."""

    def halve(layer: nn.Module, *_: object) -> None:
        layer.norm2.weight.detach().mul_(0.5)

    runs = []
    for _ in range(2):
        network = build("transformer", METHODS["dgl"], BLOCKS)
        for name, parameter in network.model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        runs.append(Run(network, OPTIMIZERS["adamw"]))
    residence = localgrad.resident(runs[0].network, "cpu")
    frozen = sum(p.nbytes for p in runs[0].network.parameters() if not p.requires_grad)
    frozen -= sum(t.nbytes for t in residence.kept)
    for number in range(3):
        if number == 2:
            before = residence.fetched, residence.written
            for run in runs:
                layer = run.network.model.layers[1]
                layer.register_forward_pre_hook(halve)
        for run in runs:
            for _, loss in localgrad.local_losses(
                run.network, *batch(), number, autocast=torch.bfloat16, on_block_done=run.done
            ):
                loss.backward()
                run.losses.append(loss.detach())
    fetched, written = residence.fetched - before[0], residence.written - before[1]
    assert fetched - written == frozen - runs[0].network.model.layers[1].norm2.weight.nbytes
    assert torch.equal(*(run.network.model.layers[1].norm2.weight for run in runs))


def test_a_network_that_is_collected_while_an_optimizer_steps_harms_nobody() -> None:
    """A cycle holds it, so that the collector decides when it goes: here as another hook of the same step runs."""
    import gc

    from torch.optim.optimizer import register_optimizer_step_pre_hook

    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], 0.5)
    parameter.grad = torch.ones(2)
    first = register_optimizer_step_pre_hook(lambda *_: (gc.collect(), None)[1])
    try:
        x = torch.randn(4, 4)
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(2)))
        network = localgrad.localize(model, localgrad.methods.dgl(localgrad.tasks.classification(4)), 2, example=x)
        localgrad.resident(network, "cpu")
        network.cycle = [network]
        del network, model
        optimizer.step()
    finally:
        first.remove()
    assert torch.equal(parameter.detach(), torch.full((2,), 0.5))
