"""``localgrad train --parallel``: one run on several processes that torchrun started."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from localgrad.config import Config, dump
from localgrad.data.loaders import Files
from localgrad.distributed.agreement import agree, everyone, explained, gather_text
from localgrad.distributed.block_parallel import block_parallel
from localgrad.distributed.compression import Wire
from localgrad.distributed.data_parallel import data_parallel, digest_of
from localgrad.distributed.mesh import device_mesh
from localgrad.errors import ConfigError, LocalgradError, TrainingError
from localgrad.measure.plots import curves_picture
from localgrad.spec import method_name
from localgrad.train.experiment import Experiment, build, device_of
from localgrad.train.folder import RunFolder
from localgrad.train.loop import train
from localgrad.train.optim import Stepper
from localgrad.train.progress import Progress
from localgrad.train.run import Interrupted, measure_costs, result_of, stop_requests

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
DIGESTED = 64  # images, by which ranks see that they have the same data


@dataclass(frozen=True)
class Layout:
    """How a job is laid out.

    Args:
        block, data: ranks along each axis.
        wire: how features travel between ranks, see `localgrad.distributed.block_parallel`; what the run was begun with
            if None, which is ``same`` for a new one.
        timeout: seconds after which a rank that waits for another one gives up.
    """

    block: int = 1
    data: int = 1
    wire: Wire | None = None
    timeout: float = 600.0

    def __str__(self) -> str:
        return f"block={self.block},data={self.data}"


def parsed(layout: str) -> Layout:
    """``data=2,block=2,wire=bf16,timeout=60``; 1 where an axis is not named.

    Raises:
        ConfigError: anything else.
    """
    found: dict[str, Any] = {}
    for word in layout.split(","):
        name, _, value = word.partition("=")
        if name in ("block", "data") and re.fullmatch(r"0*[1-9]\d{0,5}", value):
            found[name] = int(value)
        elif name == "wire" and value in get_args(Wire):
            found[name] = value
        elif name == "timeout" and re.fullmatch(r"\d{1,6}(\.\d+)?", value) and float(value) > 0:
            found[name] = float(value)
        else:
            raise ConfigError(
                f"--parallel {layout}: {word!r} is none of data=2, block=2, wire={'|'.join(get_args(Wire))} and "
                "timeout=600 (seconds); write for instance data=2,block=2"
            )
    return Layout(**found)


@contextlib.contextmanager
def processes(layout: Layout, device: torch.device) -> Iterator[DeviceMesh]:
    """The mesh of a job that torchrun started, (block, data).

    Args:
        layout: ranks along each axis, and how long one waits for another.
        device: whose backend carries gradients; links between blocks go through the memory of the host.

    Raises:
        ConfigError: not started by torchrun, or with another number of processes.
    """
    needed = layout.block * layout.data
    command = f"torchrun --nproc-per-node={needed} -m localgrad train ..."
    if "RANK" not in os.environ:
        raise ConfigError(f"--parallel needs {needed} processes; start them with: {command}")
    if int(os.environ["WORLD_SIZE"]) != needed:
        raise ConfigError(
            f"--parallel {layout} needs {needed} processes, but {os.environ['WORLD_SIZE']} were started; write: "
            f"{command}"
        )
    if _restarts() and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in os.environ:
        warnings.warn(
            "restarted without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: ranks may meet addresses of those that died; set "
            "it in the environment of torchrun",
            stacklevel=2,
        )
    _end_with_launcher()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=layout.timeout))
    except RuntimeError as error:  # DistStoreError and DistNetworkError are RuntimeErrors
        raise TrainingError(
            f"rank {os.environ['RANK']} did not meet the others within {layout.timeout:g} s of starting "
            f"({next(iter(str(error).splitlines()), type(error).__name__)}): one has died, hangs, or starts more "
            "slowly than timeout= of --parallel allows"
        ) from error
    yield device_mesh(device.type, block=layout.block, data=layout.data, timeout=layout.timeout)
    # Not after an error: what is left to send to ranks that are gone would keep this one from ending.
    dist.destroy_process_group()


def _end_with_launcher() -> None:
    """Have the kernel end this process when torchrun is killed: it would train on, beside those started next."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(
    config: Config,
    path: Path,
    layout: Layout,
    console: Console,
    *,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any] | None:
    """Train one method on all processes and write its directory from the first.

    A job that torchrun has restarted goes on from its last checkpoint, at most ``train.checkpoint_every`` steps or an
    epoch ago; with a run that this job has not begun it does what its first attempt did.

    Returns:
        the result on rank 0, None on the others; see `localgrad.train.run.run`.

    Raises:
        Interrupted: SIGINT, SIGTERM, SIGHUP, or nobody reads the progress any more; on any rank, after the next
            checkpoint.
    """
    _check(config, layout)
    device = device_of(config.train.device)
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, device=f"cuda:{local}"))
        torch.cuda.set_device(local)
    with processes(layout, device) as mesh:
        first = dist.get_rank() == 0
        agree(everyone(), {"settings": dump(config), "wire": str(layout.wire)})
        folder = RunFolder(path)
        folder.first = first
        folder.continues, wire = _heeded(
            lambda: _claimed(folder, config, layout, resume=resume, overwrite=overwrite) if first else None
        )
        experiment = build(config, mesh["data"].get_local_rank(), layout.data)
        data = experiment.data
        amount = f"{data.title}, {data.train.num_samples} images, {len(data.train)} batches"
        digests = {f"first images of the {name} split": _digest(getattr(data, name)) for name in ("train", "test")}
        agree(everyone(), {"data": amount, **digests})
        network = experiment.network
        if layout.block > 1:
            block_parallel(network, mesh, wire=wire)
        if layout.data > 1:
            data_parallel(network, mesh)
        experiment.stepper = Stepper(network, config.optim, experiment.stepper.scaler)
        with contextlib.closing(folder):
            folder.open(experiment, timedelta(seconds=layout.timeout))
            if first and isinstance(data.train, Files):
                console.print(f"{data.title}: {data.train.how}", style="dim", soft_wrap=True)
            _train(experiment, folder, console if first else Console(quiet=True))
            return _finished(experiment, folder, {"block": layout.block, "data": layout.data, "wire": wire})


def _digest(split: Any) -> str:
    """Of a loader's first images, the same ones on every replica; those of training are drawn from all of them."""
    order = dataclasses.replace(
        split.order, replica=0, num_replicas=1, batch_size=min(split.order.batch_size, DIGESTED)
    )
    batch = next(iter(dataclasses.replace(split, order=order).epoch(0)))
    return f"{digest_of(leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)).tolist()}"


def _restarts() -> int:
    """How often torchrun has restarted this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _check(config: Config, layout: Layout) -> None:
    if layout.wire not in (None, "same") and layout.block == 1:
        raise ConfigError(
            f"wire={layout.wire} rounds features between ranks along the blocks; add block=2 to --parallel"
        )
    if config.beside:
        raise ConfigError("--parallel trains one method; add beside=[]")
    if config.train.precision == "fp16" and layout.block > 1:
        raise ConfigError("train.precision=fp16 scales the loss of all blocks by one number; use bf16 with block > 1")
    if config.train.resident and layout.block > 1:
        raise ConfigError("train.resident=true has all blocks in one process; leave it out with block > 1")
    if config.train.capture is True:
        raise ConfigError("train.capture=true records the steps of one process; leave it out with --parallel")
    if config.train.profile is not None:
        raise ConfigError(f"train.profile={config.train.profile} traces one process; leave it out with --parallel")
    if config.train.ema_decay is not None:
        raise ConfigError(f"train.ema_decay={config.train.ema_decay} is for one process; leave it out with --parallel")


def _job() -> str:
    """What tells this job from others, on every attempt alike: the launcher of the first rank."""
    started = ""
    with contextlib.suppress(OSError):  # a number of a process is used again
        started = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{name} {socket.gethostname()} {os.getppid()} {started}"


def _claimed(folder: RunFolder, config: Config, layout: Layout, *, resume: bool, overwrite: bool) -> tuple[bool, Wire]:
    """Take the directory on the first rank; whether its run continues, and how features travel in it.

    Raises:
        ConfigError: they travelled otherwise than ``layout`` says.
    """
    job = _job()
    folder.claim(resume=resume, overwrite=overwrite, job=job if _restarts() else None)
    wire: Wire = layout.wire or "same"
    if folder.continues:
        begun: Wire = folder.begun().get("wire", wire)
        if layout.wire not in (None, begun):
            raise ConfigError(
                f"{folder.path} was begun with wire={begun} and cannot go on with {layout.wire}; leave wire= out, or "
                "begin anew with --overwrite"
            )
        wire = begun
    if wire != "same" and layout.block == 1:
        raise ConfigError(f"wire={wire} rounds features between ranks along the blocks; add block=2 to --parallel")
    folder.begin(dump(config), job, wire)
    return folder.continues, wire


def _heeded(decide: Callable[[], tuple[bool, Wire] | None]) -> tuple[bool, Wire]:
    """What the first rank decides, on every rank; what it refuses is raised on all of them."""
    refusal, decided = None, None
    try:
        decided = decide()
    except LocalgradError as error:
        refusal = str(error)
    refusal, decided = json.loads(gather_text(everyone(), json.dumps([refusal, decided]))[0])
    if refusal is not None:
        raise ConfigError(refusal)
    return decided[0], decided[1]


def _train(run: Experiment, folder: RunFolder, console: Console) -> None:
    every = run.config.train.checkpoint_every
    title = method_name(run.config.method)
    with Progress(console, title) as progress, stop_requests() as asked:

        def stop_if_asked() -> None:
            stopping = torch.tensor([int(asked() or progress.unread)])
            with explained("asking all ranks whether to stop"):
                dist.all_reduce(stopping, dist.ReduceOp.MAX)
            if stopping.item():
                raise Interrupted(f"stopped at step {run.step} and saved; continue with the same command and --resume")

        def after_step(state: Experiment) -> None:
            if every is not None and state.step % every == 0:
                folder.save(state)
                stop_if_asked()

        def after_epoch(state: Experiment) -> None:
            folder.finish_epoch(state)
            progress.epoch(state)
            stop_if_asked()

        train(run, after_step, after_epoch)


def _finished(run: Experiment, folder: RunFolder, parallel: dict[str, Any]) -> dict[str, Any] | None:
    network = run.network
    if network.replicas is not None:
        network.replicas.average_buffers()
        network.replicas = None
    if network.stage is not None:
        network.stage.gather()
    if not folder.first:
        return None
    result = result_of(run, folder) | {"parallel": parallel}
    folder.finish(run, result)
    curves_picture(run.history, result["method"], folder.path / "curves.png")
    measure_costs([result], [run])
    return result
