"""Two ranks of sleeping blocks on the wall clock, by block-parallel local learning; a trace of what ran when.

``torchrun --nproc-per-node=2 bench/block_parallel_timeline.py results/distributed-2026-11-21``
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import localgrad
from localgrad.distributed import block_parallel
from localgrad.distributed.agreement import everyone, gather_text
from localgrad.distributed.timeline import Event, chrome_trace

FORWARD, BACKWARD, STEPS = 0.03, 0.06, 10


class Sleep(torch.autograd.Function):
    """A block that costs time and no processor."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        time.sleep(FORWARD)
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        time.sleep(BACKWARD)
        return gradient


class Block(nn.Linear):
    """Linear, then asleep."""

    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(super().forward(x))


def main(folder: Path) -> None:
    """Train, and write ``timeline.json``; scripts/figures.py draws it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    first, last = Block(8, 8), nn.Sequential(Block(8, 8), nn.Linear(8, 4))
    method = localgrad.methods.dgl(localgrad.tasks.classification(4))
    example = torch.randn(2, 8)
    network = localgrad.localize(nn.Sequential(first, last), method, [first, last], example=example)
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("block",))
    stage = block_parallel(network, mesh).stage
    stage.timeline.record()
    dist.barrier()
    began = time.perf_counter()
    for step in range(STEPS):
        localgrad.backward(network, torch.randn(8, 8), torch.arange(8) % 4, step)
        localgrad.exchange(network)
    stage.close()
    events = [Event(**{**asdict(e), "start": e.start - began, "end": e.end - began}) for e in stage.timeline.events]
    rows = gather_text(everyone(), json.dumps([asdict(event) for event in events]))
    if dist.get_rank() == 0:
        measured = {rank: [Event(**event) for event in json.loads(row)] for rank, row in enumerate(rows)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "timeline.json").write_text(chrome_trace(measured))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
