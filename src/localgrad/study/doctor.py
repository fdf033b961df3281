"""What a machine has, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path

import torch

from localgrad import __version__, data
from localgrad.config import Config, DataConfig
from localgrad.data.loaders import Files, Loader
from localgrad.measure.work import measure_link
from localgrad.train.experiment import device_of, load_data

OPTIONAL = {
    "timm": "pip install localgrad[timm]",
    "tensorboard": "pip install localgrad[tensorboard]",
    "scipy": "only SVHN needs it: pip install localgrad[svhn]",
}


def findings() -> list[dict[str, str]]:
    """Rows of ``what``, ``found`` and ``remark``; the remark says what to do, empty if nothing."""
    rows = [_row("localgrad", __version__), _row("Python", platform.python_version())]
    rows += [_row("platform", f"{platform.system()} {platform.machine()}")]
    for name in ("torch", "torchvision", "greenlet", "numpy", "safetensors", "typer"):
        rows.append(_row(name, _version(name) or "missing", "" if _version(name) else f"pip install {name}"))
    rows.append(_torchvision())
    for name, remedy in OPTIONAL.items():
        rows.append(_row(name, _version(name) or "not installed", "" if _version(name) else remedy))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            rows.append(_row(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
            link = measure_link(torch.device("cuda", index)) / 1e9
            rows.append(_row(f"link to cuda:{index}", f"{link:.1f} GB/s", "from pinned memory; see plan --rates"))
    else:
        rows.append(_row("CUDA", "no device", "training runs on the CPU"))
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    remark = "" if threads <= cores else f"more threads than cores; set OMP_NUM_THREADS={cores}"
    rows.append(_row("CPU", f"{cores} cores, {threads} threads", remark))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    rows.append(_row("disk", f"{free:.0f} GiB free here", "" if free > 1 else "checkpoints may not fit"))
    for found in data.available():
        rows.append(_row(f"data {found.name}", "found" if found.found else "not found", str(found.where)))
    return rows


def reading(name: str, seconds: float = 20.0) -> tuple[str, list[dict[str, str]], list[str]]:
    """How long an epoch of the training images of ``name`` takes without training, in the settings of a run.

    The first epoch decodes; a later one finds in memory what was kept. A measurement ends after ``seconds``, and is
    then scaled up to an epoch by the share of batches that were read.

    Returns:
        a title; rows of ``workers``, ``opened``, ``first epoch``, ``later epoch`` (seconds) and ``images/s``, for this
        process alone and, where files are read, for as many workers as there are cores; remarks on them.
    """
    device = device_of("auto")
    rows: list[dict[str, str]] = []
    remarks = []
    for workers in (0, os.cpu_count() or 1):
        start = time.perf_counter()
        found = load_data(Config(method=["e2e"], data=DataConfig(name=name, workers=workers, validation=0)), device)
        opened = time.perf_counter() - start
        first, _ = _epoch(found.train, device, seconds)
        later, share = _epoch(found.train, device, seconds)
        row = [str(workers), f"{opened:.2f}", f"{first:.2f}", f"{later:.2f}", f"{found.train.num_samples / later:.0f}"]
        rows.append(dict(zip(("workers", "opened", "first epoch", "later epoch", "images/s"), row, strict=True)))
        remarks.append(f"{workers} workers: {found.train.how}.")
        if share < 1:
            remarks.append(f"{workers} workers: scaled up from {share:.1%} of the batches of an epoch.")
        if not isinstance(found.train, Files):
            break
    return f"{found.title}, {found.train.num_samples} images to train on, batches on {device}", rows, remarks


def _epoch(loader: Loader, device: torch.device, seconds: float) -> tuple[float, float]:
    """Seconds of an epoch, and which share of it was read to know."""
    start = time.perf_counter()
    for number, _ in enumerate(loader.epoch(0), 1):  # noqa: B007
        if time.perf_counter() - start > seconds:
            break
    if device.type == "cuda":
        torch.cuda.synchronize()
    share = number / len(loader)
    return (time.perf_counter() - start) / share, share


def _row(what: str, found: str, remark: str = "") -> dict[str, str]:
    return {"what": what, "found": found, "remark": remark}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torchvision() -> dict[str, str]:
    try:
        import torchvision.ops

        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    except ImportError:
        return _row("torchvision ops", "missing", "pip install torchvision")
    except RuntimeError as error:
        return _row(
            "torchvision ops",
            "broken",
            f"{str(error).splitlines()[0]}: torch and torchvision are of different builds (CPU, CUDA); install a pair",
        )
    return _row("torchvision ops", "work")
