"""Blocks whose parameters are spread over replicas by FSDP2 are trained like whole ones."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.distributed as dist
from test_data_parallel import EVERY, apart, network_of, without_batch_statistics
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import gang
import localgrad
from localgrad import methods
from localgrad.distributed import Checkpoints, block_parallel, data_parallel
from zoo import METHODS, batch, build, steps

BRIEF = ["man_pp(dgl)", "accumulation(windows(dgl))", "pgl(man(mlaan(dgl)))"]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_of(network: localgrad.LocalNetwork) -> torch.optim.Optimizer:
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.003, weight_decay=0.01)


def train(
    network: localgrad.LocalNetwork, optimizer: torch.optim.Optimizer, rows: slice, numbers: list[int]
) -> dict[str, torch.Tensor]:
    """The state after steps of these numbers, on these rows of eight samples."""
    for step in numbers:
        x, y = batch(seed=step)
        for _, loss in localgrad.local_losses(network, x.double()[rows], y[rows], step):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        localgrad.exchange(network)
    return {name: whole(tensor.detach()) for name, tensor in network.state_dict().items()}


def rows_of(rank: int) -> slice:
    return slice(4 * rank, 4 * rank + 4)


def compare(names: list[str]) -> dict[str, float]:
    """The largest difference to one process on the joined batch, for each method."""
    mesh, rank = init_device_mesh("cpu", (2,), mesh_dim_names=("data",)), dist.get_rank()
    found = {}
    for name in names:
        network = data_parallel(network_of(name, seed=rank), mesh, shard=True)
        parts = [p for p in network.parameters() if isinstance(p, DTensor)]
        assert sum(p.to_local().numel() for p in parts) <= 0.6 * sum(p.numel() for p in parts)
        numbers = [*steps(network), 3, 4][:3]
        ours = train(network, optimizer_of(network), rows_of(rank), numbers)
        network.replicas.check_equal()
        reference = network_of(name)
        found[name] = apart(ours, train(reference, optimizer_of(reference), slice(None), numbers))
    return found


def check(names: list[str]) -> None:
    for found in gang.run(compare, 2, names, timeout=300):
        assert set(found) == set(names)
        assert not {name: value for name, value in found.items() if not value < 1e-10}


def test_sharded_blocks_equal_one_process() -> None:
    check(BRIEF)


@pytest.mark.slow_distributed
def test_sharded_blocks_equal_one_process_by_every_method() -> None:
    check([name for name in EVERY if name not in BRIEF and "sgr" not in name])


def models() -> dict[str, float]:
    """Memory, a model that reads parameters off itself, and what is refused."""
    mesh, rank = init_device_mesh("cpu", (2,), mesh_dim_names=("data",)), dist.get_rank()

    def made() -> localgrad.LocalNetwork:
        network = build("transformer", METHODS["dgl"], 4, dropout=0.0)
        without_batch_statistics(network.auxiliary)
        return network.double()

    network = data_parallel(made(), mesh, shard=True)
    optimizer = optimizer_of(network)
    ours = train(network, optimizer, rows_of(rank), [0, 1])
    reference = made()
    found = {"transformer": apart(ours, train(reference, optimizer_of(reference), slice(None), [0, 1]))}
    kept = [t for p, slots in optimizer.state.items() for t in (p, slots["exp_avg"], slots["exp_avg_sq"])]
    local = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in kept)
    found["share of memory"] = local / sum(t.numel() for t in kept)
    x, y = batch()
    try:
        data_parallel(network_of("sgr(dgl)"), mesh, shard=True)
    except localgrad.MethodError as error:
        assert "differentiates a block twice" in str(error)
        found["twice"] = 0.0
    try:
        localgrad.backward(network, x.double()[rank:], y[rank:])
    except localgrad.TrainingError as error:
        assert "have [8, 7] samples at step 0, but shard=True averages over ranks" in str(error)
        found["uneven"] = 0.0
    return found


def test_memory_is_divided_also_where_a_model_reads_its_own_parameters() -> None:
    for found in gang.run(models, 2):
        assert found["transformer"] < 1e-10 and {"twice", "uneven"} <= found.keys()
        assert found["share of memory"] < 0.52


NAMES = ("dgl", "pgl(dgl)")


def on_both_axes(folder: str) -> None:
    """Two by two: blocks on two ranks, each a half on either of two replicas; saved after three of five steps."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("block", "data"))
    rows = rows_of(mesh["data"].get_local_rank())
    for name in NAMES:
        network = data_parallel(block_parallel(network_of(name), mesh), mesh, shard=True)
        optimizer = optimizer_of(network)
        checkpoints = Checkpoints(f"{folder}/{name}", network, [optimizer], keep=3)
        train(network, optimizer, rows, [0, 1, 2])
        checkpoints.save(3, wait=False)
        train(network, optimizer, rows, [3, 4])
        checkpoints.save(5)
        network.stage.close()
        try:
            network.stage.gather()
        except localgrad.ConfigError as error:
            assert "save with Checkpoints" in str(error)
        again = data_parallel(block_parallel(network_of(name, seed=1), mesh), mesh, shard=True)
        optimizer = optimizer_of(again)
        checkpoints = Checkpoints(f"{folder}/{name}", again, [optimizer], keep=3)
        assert checkpoints.load(3) == 3
        train(again, optimizer, rows, [3, 4])
        checkpoints.save(6)
        again.stage.close()
    network = block_parallel(network_of("man(dgl)"), mesh)
    try:
        data_parallel(network, mesh, shard=True)
    except localgrad.MethodError as error:
        assert "has twins of units on other ranks" in str(error)
    else:
        raise AssertionError("twins across ranks were not refused")


@pytest.mark.slow_distributed
def test_two_by_two_sharded_saves_what_one_process_continues() -> None:
    """The same weights, and a checkpoint that either layout loads."""
    with tempfile.TemporaryDirectory() as folder:
        gang.run(on_both_axes, 4, folder, timeout=200)
        for name in NAMES:
            reference = network_of(name)
            expected = train(reference, optimizer_of(reference), slice(None), [0, 1, 2, 3, 4])
            for step in (3, 5, 6):
                network = network_of(name, seed=1)
                optimizer = optimizer_of(network)
                assert Checkpoints(f"{folder}/{name}", network, [optimizer]).load(step) == step
                found = train(network, optimizer, slice(None), [3, 4] if step == 3 else [])
                assert apart(found, expected) < 1e-10, (name, step)


TOKENS = 12
TOKEN_DGL = methods.dgl(localgrad.tasks.classification(TOKENS))


class Tied(nn.Module):
    """Runs only as itself: keyword inputs, a parameter of its own, and one that the first and the last block train."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, 8), nn.Linear(8, TOKENS, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(8))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, *, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.scale
        for layer in self.layers:
            x = x + layer(x) * mask[..., None]
        return self.head(x.mean(1))


def tied(method: localgrad.Method, seed: int = 0) -> localgrad.LocalNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        example = {"tokens": torch.randint(TOKENS, (2, 6)), "mask": torch.ones(2, 6)}
        network = localgrad.localize(Tied(), method, 3, example=example, shared=True)
    without_batch_statistics(network.auxiliary)
    return network.double()


def own_forward() -> dict[str, float]:
    """Differences to one process; what is sharded, and what stays whole."""
    mesh, rank = init_device_mesh("cpu", (2,), mesh_dim_names=("data",)), dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "tokens": torch.randint(TOKENS, (8, 6), generator=generator),
        "mask": torch.rand(8, 6, generator=generator).double(),
    }
    found = {}
    for name, method in {"dgl": TOKEN_DGL, "windows": methods.windows(TOKEN_DGL)}.items():
        states = []
        for shard in (False, True, None):
            network = tied(method) if shard is None else data_parallel(tied(method, seed=rank), mesh, shard=shard)
            rows = slice(None) if shard is None else rows_of(rank)
            if shard:
                whole_ones = {n for n, p in network.model.named_parameters() if not isinstance(p, DTensor)}
                assert whole_ones == {"scale", "embed.weight"}
            optimizer = optimizer_of(network)
            for step in range(3):
                mine = {key: value[rows] for key, value in inputs.items()}
                localgrad.backward(network, mine, torch.arange(8)[rows], step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            states.append({key: whole(tensor.detach()) for key, tensor in network.state_dict().items()})
        found |= {f"{name}, whole": apart(states[0], states[2]), f"{name}, sharded": apart(states[1], states[2])}
    return found


def test_a_model_that_runs_only_as_itself_is_replicated_and_sharded() -> None:
    for found in gang.run(own_forward, 2):
        assert len(found) == 4 and max(found.values()) < 1e-10, found


class Inside(nn.Module):
    """Returns what its first layer made beside what it makes of it: separate blocks have to look inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        early = self.first(x)
        return self.second(early.relu()), early


class Outside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.middle, self.last = Inside(), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, early = self.inside(x)
        return self.last(self.middle(x).relu() + early)


def with_taps() -> dict[str, float]:
    """Blocks that run again in the backward pass, so that their modules are called one by one."""
    mesh, rank = init_device_mesh("cpu", (2,), mesh_dim_names=("data",)), dist.get_rank()
    task = localgrad.tasks.classification(4)
    x, y = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 4
    found = {}
    for name, method in {"own": methods.e2e(task), "separate": methods.checkpointing(methods.e2e(task))}.items():
        states = []
        for shard in (True, False):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = localgrad.localize(Outside(), method, ("middle", "last"), example=torch.randn(2, 8)).double()
            if shard:
                data_parallel(network, mesh, shard=True)
                assert all(isinstance(p, DTensor) for p in network.parameters())
            optimizer, rows = optimizer_of(network), rows_of(rank) if shard else slice(None)
            for step in range(2):
                localgrad.backward(network, x[rows], y[rows], step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            states.append({key: whole(tensor.detach()) for key, tensor in network.state_dict().items()})
        found[name] = apart(*states)
    return found


def test_modules_that_separate_blocks_look_into_are_sharded_part_by_part() -> None:
    for found in gang.run(with_taps, 2):
        assert len(found) == 2 and max(found.values()) < 1e-10, found
