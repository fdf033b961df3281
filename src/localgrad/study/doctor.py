"""What a machine has, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from localgrad import __version__, data

OPTIONAL = {
    "timm": "pip install localgrad[timm]",
    "tensorboard": "pip install localgrad[tracking]",
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
