"""The processes of a job as a grid: ranks along the blocks, ranks along the replicas."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from localgrad.errors import ConfigError


def device_mesh(device: str, *, block: int = 1, data: int = 1, timeout: float | None = None) -> DeviceMesh:
    """A mesh with the dimensions ``("block", "data")`` over all ranks, neighbours along ``data`` next to each other.

    Differs from ``torch.distributed.init_device_mesh``: that gives the groups of each dimension torch's 30 minutes,
    whatever ``init_process_group(timeout=...)`` was told.

    Args:
        device: type of the devices, ``cpu`` or ``cuda``.
        block, data: ranks along each dimension.
        timeout: seconds a rank waits for another one of its row or column; torch's 30 minutes if None.

    Raises:
        ConfigError: the job has another number of processes.
    """
    if block * data != dist.get_world_size():
        raise ConfigError(
            f"block={block}, data={data} needs {block * data} processes, but this job has {dist.get_world_size()}; "
            f"start them with torchrun --nproc-per-node={block * data}"
        )
    ranks = torch.arange(block * data).view(block, data)
    patience = None if timeout is None else timedelta(seconds=timeout)
    groups: list[dist.ProcessGroup] = []
    for rows in (ranks.T, ranks):  # along the blocks, along the replicas
        made = [dist.new_group(row, timeout=patience) for row in rows.tolist()]
        groups += [group for group in made if isinstance(group, dist.ProcessGroup)]
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=("block", "data"))
