"""Blocks on several ranks give the weights of one process, bit for bit."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import gang
import localgrad
from bridged import bridged
from localgrad import methods
from localgrad.distributed import block_parallel
from zoo import METHODS, batch, build

DGL = METHODS["dgl"]
EVERY = METHODS | {
    "man, before": bridged(DGL, exchange="before", buffers="ema"),
    "man, copies": bridged(DGL, buffers="copy"),
    "2 parts, man, before, copies": methods.accumulation(bridged(DGL, exchange="before", buffers="copy"), parts=2),
    "mlaan, 3 blocks, all twins": methods.mlaan(methods.windows(DGL, width=3), twins="all", leap="both"),
    "4 parts, windows": methods.accumulation(METHODS["windows(dgl)"], parts=4),
    "6 parts, windows of 3": methods.accumulation(methods.windows(DGL, width=3), parts=6),
    "2 parts, pgl(man(mlaan))": methods.accumulation(methods.pgl(methods.man(METHODS["mlaan(dgl)"]), every=3), parts=2),
    "2 parts, pgl(man(windows))": methods.accumulation(
        methods.pgl(methods.man(METHODS["windows(dgl)"]), every=3), parts=2
    ),
    "3 parts, e2e": methods.accumulation(METHODS["e2e"], parts=3),
    "2 parts, deep supervision": methods.accumulation(METHODS["deep_supervision"], parts=2),
    "3 parts, dgl, on the host": methods.accumulation(DGL, parts=3, wait="host"),
    "3 parts, dgl, rounded": methods.accumulation(DGL, parts=3, wait="bf16"),
    "3 parts, windows side by side, rounded": methods.accumulation(
        methods.windows(DGL, width=2, stride=2), parts=3, wait="bf16"
    ),
}
# Ten batches by these, and a few by all others.
LONG = ("dgl", "man(dgl)", "man_pp(dgl)", "mlaan(dgl)", "pgl(dgl)", "2 parts, pgl(man(mlaan))")


def optimizer_of(network: localgrad.LocalNetwork) -> torch.optim.Optimizer:
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True)


def train(network: localgrad.LocalNetwork, reads: bool, steps: int) -> None:
    """The loop of the README; batches of 14 images, the last one of 12."""
    optimizer = optimizer_of(network)
    with localgrad.keyed_randomness(seed=3):
        for step in range(steps):
            x, y = batch(14 if step < steps - 1 else 12, seed=step) if reads else (None, None)
            for _, loss in localgrad.local_losses(network, x, y, step):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            localgrad.exchange(network)


def every_method(model: str, num_blocks: int, names: list[str]) -> dict[str, str]:
    """``equal``, why a method is refused, or which tensors differ; compared on the first rank, that gathers all."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("block",))
    first = dist.get_rank() == 0
    found: dict[str, str] = {}
    for name in names:
        steps = 10 if name in LONG else 4
        network = build(model, EVERY[name], num_blocks)
        try:
            block_parallel(network, mesh)
        except localgrad.MethodError as error:
            found[name] = str(error)
            continue
        train(network, first, steps)
        network.stage.gather()
        if first:
            reference = build(model, EVERY[name], num_blocks)
            train(reference, True, steps)
            ours, theirs = network.state_dict(), reference.state_dict()
            wrong = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
            found[name] = f"{len(wrong)} of {len(theirs)} differ: {wrong[:3]}" if wrong else "equal"
    return found


REFUSED = {
    "local_critic": "lets heads follow",
    "feature_distillation": "over the whole model",
    "last_head_distillation(dgl)": "over the whole model",
    "sgr(dgl)": "compares the gradients",
    "logit_consistency(dgl)": "compares the answers",
}


def check(found: dict[str, str]) -> None:
    wrong = {
        name: what
        for name, what in found.items()
        if what != "equal" and not (name in REFUSED and REFUSED[name] in what)
    }
    assert not wrong, wrong


def test_two_ranks_equal_one_process() -> None:
    found, _ = gang.run(every_method, 2, "residual", 4, list(EVERY), timeout=240)
    assert set(found) == set(EVERY)
    check(found)


def test_three_ranks_equal_one_process() -> None:
    names = ["dgl", "windows(dgl)", "man(dgl)", "6 parts, windows of 3", "2 parts, pgl(man(mlaan))", "3 parts, e2e"]
    found, *_ = gang.run(every_method, 3, "transformer", 4, names, timeout=240)
    assert set(found) == set(names)
    check(found)


class Tapped(nn.Module):
    """What the first block makes, and the input itself, are read again by later blocks, on other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.middle, self.end = (self.unit(inputs) for inputs in (3, 8, 8))
        self.join, self.last, self.fc = nn.Conv2d(19, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1), nn.Linear(8, 4)

    @staticmethod
    def unit(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        early = self.begin(x)
        joined = self.join(torch.cat([early, self.end(self.middle(early)), x], 1)).relu()
        return self.fc(self.last(torch.cat([joined, early], 1)).relu().mean((2, 3)))


CUTS = ("middle", "end", "join", "last")
TAPPED = {
    "dgl": DGL,
    "windows": METHODS["windows(dgl)"],
    "2 parts, windows of 4": methods.accumulation(methods.windows(DGL, width=4), parts=2),
    "3 parts, rounded": methods.accumulation(DGL, parts=3, wait="bf16"),
    "2 parts, pgl": methods.accumulation(methods.pgl(DGL, every=2), parts=2),
    "checkpointing(e2e)": METHODS["checkpointing(e2e)"],
}


def tapped(name: str) -> localgrad.LocalNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return localgrad.localize(Tapped(), TAPPED[name], CUTS, example=batch(2)[0])


def with_taps(place: list[int]) -> dict[str, list[str]]:
    """Which tensors differ from one process; and what evaluation answers, on the rank of the last block."""
    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    found: dict[str, list[str]] = {}
    for name in TAPPED:
        network, reference = block_parallel(tapped(name), mesh, place=place), tapped(name)
        train(network, rank == 0, 3)
        train(reference, True, 3)
        network.eval(), reference.eval()
        answers = [
            {str(span): output for span, _, output in localgrad.local_outputs(n, batch(6, seed=9)[0])}
            for n in (network, reference)
        ]
        network.stage.gather()
        ours, theirs = network.state_dict(), reference.state_dict()
        found[name] = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
        found[name] += [span for span, output in answers[0].items() if not torch.equal(output, answers[1][span])]
    return found


def test_taps_and_inputs_cross_ranks() -> None:
    for found in gang.run(with_taps, 3, [0, 0, 1, 2, 2], timeout=240):
        assert found == {name: [] for name in TAPPED}


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, *, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.linear(x) * gate


class Gated(nn.Module):
    """Its layers take a second tensor, which a copy of them needs too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fc = Gate(), Gate(), Gate(), nn.Linear(8, 4)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.fc(self.third(self.second(self.first(x, gate), gate), gate))


def not_separable() -> list[str]:
    """Models whose own forward trains in one process, and cannot be spread over ranks."""
    mesh, x = init_device_mesh("cpu", (2,)), torch.randn(2, 8)
    hooked = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    hooked.register_forward_hook(lambda *_: None)
    found = []
    for model, method, example in (
        (Keywords(), DGL, {"x": x}),
        (hooked, DGL, x),
        (Gated(), methods.man(DGL), (x, x.sigmoid())),
    ):
        network = localgrad.localize(model, method, 2, example=example)
        try:
            block_parallel(network, mesh)
        except localgrad.LocalgradError as error:
            found.append(str(error))
        assert network.stage is None
    return found


class TokenMixer(nn.Module):
    """Each token sees the mean of itself and those before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1).view(1, -1, 1)
        return x + self.linear(x.cumsum(1) / counts).tanh()


def token_model(read_out: Literal["own", "shared"]) -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    layers = [nn.Embedding(11, 8), *(TokenMixer(8) for _ in range(3)), nn.LayerNorm(8), nn.Linear(8, 11, bias=False)]
    task = localgrad.tasks.language_model(11, read_out=read_out)
    return localgrad.localize(nn.Sequential(*layers), methods.dgl(task), ["2", "3"], example=tokens(0)[:2])


def tokens(step: int) -> Tensor:
    return torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(step))


def language_models() -> tuple[str, list[str]]:
    """What is said of a head on the first rank that reads the matrix of the second one; what differs with an own."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("block",))
    with pytest.raises(localgrad.MethodError) as refused:
        block_parallel(token_model("shared"), mesh)
    network, alone = token_model("own"), token_model("own")
    block_parallel(network, mesh)
    for one in (network, alone):
        optimizer = optimizer_of(one)
        for step in range(4):
            for _, loss in localgrad.local_losses(one, tokens(step), tokens(step), step):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            localgrad.exchange(one)
    network.stage.gather()
    ours, theirs = network.state_dict(), alone.state_dict()
    differing = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
    return str(refused.value), differing if dist.get_rank() == 0 else []  # the first rank gathers


def test_language_models_with_heads_of_their_own() -> None:
    for refused, differing in gang.run(language_models, 2):
        assert "a head that reads parameters of a block on another rank" in refused and not differing


def test_models_without_separate_blocks_are_refused() -> None:
    for keywords, hooked, gated in gang.run(not_separable, 2):
        assert "takes a tensor or a tuple as example, not a dict" in keywords
        assert "would pass by the hooks" in hooked
        assert "copies a later unit that is called with the tensor 1 besides the features" in gated
