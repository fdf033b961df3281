"""Saving while training goes on, and disks that are full."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_layouts import END, SAVED, adam
from torch.distributed.device_mesh import init_device_mesh

import gang
import localgrad
from localgrad.distributed import Checkpoints, block_parallel, data_parallel
from zoo import METHODS, batch, build

DELAY = 4.0


def network() -> localgrad.LocalNetwork:
    return build("cnn", METHODS["dgl"], 4)


def one_step(ours: localgrad.LocalNetwork, optimizer: torch.optim.Optimizer, step: int) -> None:
    with localgrad.keyed_randomness(seed=3):
        localgrad.backward(ours, *batch(8, seed=step), step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    localgrad.exchange(ours)


def with_a_straggler(folder: str) -> dict[str, object]:
    """The second of two ranks sleeps before it saves; when each is back at work, and the weights in the end."""
    ours = block_parallel(network(), init_device_mesh("cpu", (2,), mesh_dim_names=("block",)), place=[0, 0, 1, 1])
    optimizer = adam(ours)
    checkpoints = Checkpoints(folder, ours, [optimizer])
    checkpoints.save(0, wait=False)  # the first one sets up what later ones use
    checkpoints.finish()
    for step in range(END):
        one_step(ours, optimizer, step)
        if step + 1 == SAVED:
            if dist.get_rank() == 1:
                time.sleep(DELAY)
            checkpoints.save(SAVED, wait=False)
            back = time.monotonic()
    checkpoints.finish()
    ours.stage.gather()
    return {"back": back, "state": dict(ours.state_dict())}


@pytest.mark.slow_distributed
def test_a_rank_that_is_ahead_is_not_held_back_by_saving_and_a_slow_one_changes_nothing() -> None:
    """Also where a rank is late."""
    reference = network()
    optimizer = adam(reference)
    expected = {}
    for step in range(END):
        one_step(reference, optimizer, step)
        expected[step + 1] = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        first, second = gang.run(with_a_straggler, 2, folder)
        assert second["back"] - first["back"] >= DELAY / 2
        for found in (first, second):
            assert all(torch.equal(found["state"][name], value) for name, value in expected[END].items())
        saved = network()
        assert Checkpoints(folder, saved, [adam(saved)]).load() == SAVED
        assert all(torch.equal(saved.state_dict()[name], value) for name, value in expected[SAVED].items())


def on_a_full_disk(folder: str, axis: str) -> str:
    """One rank may write no file of more than 2 kB while a second checkpoint is saved; what both say."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    ours = block_parallel(network(), mesh) if axis == "block" else data_parallel(network(), mesh)
    optimizer = adam(ours)
    checkpoints = Checkpoints(folder, ours, [optimizer])
    one_step(ours, optimizer, 0)
    checkpoints.save(1)
    one_step(ours, optimizer, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))  # write() then fails like on a full disk
    message = ""
    try:
        checkpoints.save(2)
    except localgrad.CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.load() == 1
    if ours.stage is not None:
        ours.stage.close()
    return message


@pytest.mark.slow_distributed
@pytest.mark.parametrize("axis", ["block", "data"])
def test_a_full_disk_is_an_error_on_every_rank_and_spoils_nothing_saved_before(axis: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for message in gang.run(on_a_full_disk, 2, folder, axis, group_timeout=20.0):
            assert "could not save the checkpoint" in message and "File too large" in message
            assert "Free space on the disk" in message
        assert sorted(path.name for path in Path(folder).iterdir()) == ["step00000001", "step00000002.partial"]
