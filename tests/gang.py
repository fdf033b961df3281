"""A function in several processes that form a gloo group; none of them outlives the test."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The server imports torch once, each process is a fork of it. Tests themselves cannot fork: their autograd has threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "localgrad.distributed", "zoo"])


def _main(function: Callable[..., Any], rank: int, ranks: int, folder: str, timeout: float, args: Any) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{place / 'store'}", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        result = function(*args)
        torch.save(result, place / f"partial{rank}")
        (place / f"partial{rank}").rename(place / f"result{rank}")
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early would look like one that died
            dist.destroy_process_group()
    except BaseException:
        (place / f"error{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def run(
    function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0, group_timeout: float = 90.0
) -> list[Any]:
    """What ``function(*args)`` returns on each rank: tensors, numbers, strings and containers of them.

    Raises:
        AssertionError: a rank raised (with its traceback), died or did not finish in ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_main, args=(function, rank, ranks, folder, group_timeout, args), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
                if any(p.exitcode for p in processes):
                    time.sleep(1.0)  # the others may be about to write why
                    break
                time.sleep(0.01)
        finally:
            for process in processes:
                process.kill()
                process.join()
        errors = [f"rank {path.name[5:]}: {path.read_text()}" for path in sorted(Path(folder).glob("error*"))]
        assert not errors, "\n".join(errors)
        missing = [rank for rank in range(ranks) if not (Path(folder) / f"result{rank}").exists()]
        assert not missing, (
            f"ranks {missing} gave no result in {timeout} s; exit codes {[p.exitcode for p in processes]}"
        )
        return [torch.load(Path(folder) / f"result{rank}", weights_only=True) for rank in range(ranks)]
