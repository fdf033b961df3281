"""Blocks whose parameters are spread over replicas by FSDP2 are trained like whole ones."""

from __future__ import annotations

import tempfile

import gang
import pytest
import torch
import torch.distributed as dist
from test_data_parallel import EVERY, apart, network_of, without_batch_statistics
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from zoo import METHODS, batch, build, steps

import localgrad
from localgrad.distributed import Checkpoints, block_parallel, data_parallel

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
    """Bars D3 and D9."""
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
