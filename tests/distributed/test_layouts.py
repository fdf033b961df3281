"""One checkpoint for every layout, and both kinds of parallelism at once."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from test_block_parallel import EVERY
from test_data_parallel import apart, network_of
from torch.distributed.device_mesh import init_device_mesh

import gang
import localgrad
from localgrad.distributed import Checkpoints, block_parallel, data_parallel
from zoo import batch, build

NAME = "2 parts, pgl(man(windows))"
SAVED, END = 4, 7


def network() -> localgrad.LocalNetwork:
    return build("cnn", EVERY[NAME], 4)


def adam(network: localgrad.LocalNetwork) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.01)


def train(
    network: localgrad.LocalNetwork,
    optimizer: torch.optim.Optimizer,
    start: int,
    stop: int,
    saves: Checkpoints | None = None,
) -> None:
    with localgrad.keyed_randomness(seed=3):
        for step in range(start, stop):
            x, y = batch(8, seed=step)
            for _, loss in localgrad.local_losses(network, x, y, step):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            localgrad.exchange(network)
            if saves is not None and step + 1 == SAVED:
                saves.save(SAVED, wait=False)
    if saves is not None:
        saves.finish()


def undisturbed(folder: str, shape: list[int], names: list[str], place: list[int]) -> dict[str, torch.Tensor]:
    """Ranks that save while they go on; replicas see the same samples."""
    mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=tuple(names))
    ours = block_parallel(network(), mesh, place=place)
    if "data" in names:
        data_parallel(ours, mesh)
    optimizer = adam(ours)
    train(ours, optimizer, 0, END, Checkpoints(folder, ours, [optimizer]))
    ours.stage.gather()
    return dict(ours.state_dict())


def continued(folder: str, shape: list[int], names: list[str], place: list[int]) -> dict[str, torch.Tensor]:
    """The state at the end of a run that continues on another layout; replicas see the same samples."""
    ours = network()
    torch.nn.init.zeros_(ours.model.fc.weight)  # to be replaced
    mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=tuple(names))
    if "block" in names:
        block_parallel(ours, mesh, place=place)
    if "data" in names:
        data_parallel(ours, mesh)
    optimizer = adam(ours)
    start = Checkpoints(folder, ours, [optimizer]).load()
    assert start == SAVED
    train(ours, optimizer, start, END)
    if ours.stage is not None:
        ours.stage.gather()
    return dict(ours.state_dict())


LAYOUTS = {
    "1 process": ((1,), ("none",), []),
    "2 block parallel": ((2,), ("block",), [0, 0, 1, 1]),
    "other cut": ((2,), ("block",), [0, 1, 1, 1]),
    "2 data parallel": ((2,), ("data",), []),
    "4 block parallel": ((4,), ("block",), [0, 1, 2, 3]),
    "2 x 2": ((2, 2), ("block", "data"), [0, 0, 1, 1]),
    "2 x 2, other cut": ((2, 2), ("block", "data"), [0, 0, 0, 1]),
}


@pytest.mark.parametrize(
    ("saver", "loaders"),
    [
        ("2 block parallel", ["1 process", "other cut", "2 data parallel", "4 block parallel", "2 x 2, other cut"]),
        pytest.param(
            "2 x 2", ["1 process", "2 block parallel", "2 data parallel", "2 x 2"], marks=pytest.mark.slow_distributed
        ),
    ],
)
def test_a_checkpoint_continues_exactly_on_every_layout(saver: str, loaders: list[str]) -> None:
    """Its shards by FSDP2 are in test_sharded.py."""
    reference = network()
    train(reference, adam(reference), 0, END)
    expected = reference.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        found = {"undisturbed": gang.run(undisturbed, math.prod(LAYOUTS[saver][0]), folder, *LAYOUTS[saver])}
        assert [path.name for path in Path(folder).iterdir()] == [f"step{SAVED:08d}"]
        assert not [path for path in Path(folder).rglob("*") if path.suffix not in ("", ".json", ".safetensors")]
        for name in loaders:
            found[name] = gang.run(continued, math.prod(LAYOUTS[name][0]), folder, *LAYOUTS[name])
    for name, ranks in found.items():
        for state in ranks:
            wrong = [key for key in expected if not torch.equal(expected[key], state[key])]
            assert not wrong, f"{name}: {wrong[:3]}"


def both_axes() -> dict[str, float]:
    """Two by two processes against one, in float64: blocks on two ranks, a replica of each for half of the samples."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("block", "data"))
    mine = slice(0, 5) if mesh["data"].get_local_rank() == 0 else slice(5, None)
    found = {}
    for name in ("dgl", "mlaan(dgl)", "pgl(dgl)", "predsim"):
        states = []
        for ours in (data_parallel(block_parallel(network_of(name), mesh), mesh), network_of(name)):
            trained = [p for p in ours.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
            for step in range(4):
                images, targets = batch(seed=step)
                rows = mine if ours.stage is not None else slice(None)
                localgrad.backward(ours, images.double()[rows], targets[rows], step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                localgrad.exchange(ours)
            if ours.stage is not None:
                ours.replicas.check_equal()
                ours.stage.gather()
            states.append(dict(ours.state_dict()))
        found[name] = apart(*states)
    return found


def test_two_by_two_equals_one_process() -> None:
    for found in gang.run(both_axes, 4, timeout=240):
        assert len(found) == 4 and max(found.values()) < 1e-10, found


def test_refused_checkpoints(tmp_path: Path) -> None:
    ours = network()
    optimizer = adam(ours)
    checkpoints = Checkpoints(tmp_path, ours, [optimizer], keep=2)
    assert checkpoints.load() == 0
    for step in (1, 2, 3):
        checkpoints.save(step)
    assert checkpoints.steps() == [2, 3]

    def refusal(made: Checkpoints, step: int | None = None) -> str:
        with pytest.raises(localgrad.CheckpointError) as error:
            made.load(step)
        return str(error.value)

    assert "no checkpoint of step 1; it has [2, 3]" in refusal(checkpoints, 1)
    other = build("cnn", EVERY[NAME], 3)
    assert "was written for blocks that begin at input" in refusal(Checkpoints(tmp_path, other, [adam(other)]))
    plain = build("cnn", EVERY["dgl"], 4)
    Checkpoints(tmp_path / "dgl", plain, []).save(1)
    assert "lacks network.auxiliary" in refusal(Checkpoints(tmp_path / "dgl", ours, []))
    (tmp_path / "step00000003" / "complete.json").unlink()
    with pytest.warns(UserWarning, match="cannot read .*step00000003.complete.json.*; continuing from step 2"):
        assert checkpoints.load() == 2
    (shard,) = (tmp_path / "step00000002").glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    assert f"step00000002 is damaged: {shard.name}" in refusal(checkpoints, 2)
    for _ in range(2):  # it does not begin anew, however often it is asked
        assert f"step00000002 is damaged: {shard.name}" in refusal(checkpoints)
    checkpoints.save(1)
    assert (tmp_path / "step00000002.superseded" / shard.name).is_file() and checkpoints.load() == 1
    checkpoints.save(5)
    (shard,) = (tmp_path / "step00000005").glob("*.safetensors")
    shard.unlink()
    for _ in range(2):  # reading changes nothing
        with pytest.warns(UserWarning, match=f"step00000005 is damaged: {shard.name}; continuing from step 1"):
            assert checkpoints.load() == 1
    checkpoints.save(3)
    assert checkpoints.steps() == [1, 3] and (tmp_path / "step00000005.superseded").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(localgrad.CheckpointError, match="could not save the checkpoint"):
        Checkpoints(tmp_path / "file", ours, []).save(1)
