"""What a step takes from the operating system or from the CUDA allocator, beyond the live tensors themselves."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt; left to itself it soon has both at their largest


def allocated_growth(step: Callable[[], None]) -> int:
    """By how much the peak of the CUDA allocator rises above what it holds, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_growth(step: Callable[[], None], device: torch.device) -> int | None:
    """`allocated_growth` on CUDA, else `resident_growth`."""
    return allocated_growth(step) if device.type == "cuda" else resident_growth(step)


def peak_memory(device: torch.device) -> int | None:
    """The most that this process has taken so far, in bytes: of CUDA's allocator, on a CPU resident memory.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except (OSError, StopIteration):
        return None


@contextlib.contextmanager
def storages_mapped() -> Iterator[None]:
    """Lets the C library map every large tensor by itself and hand it back when it is freed.

    What it keeps for reuse otherwise hides most of what a lean way saves: 113 MiB of resident memory instead of 49 for
    46 MiB of live tensors. Reuse is faster, so this is for measuring memory only.
    """
    c_library = _c_library()
    if c_library is None:
        yield
        return
    c_library.mallopt(_MMAP_THRESHOLD, 2**16)
    try:
        yield
    finally:
        c_library.mallopt(_MMAP_THRESHOLD, 2**25)
        c_library.mallopt(_TRIM_THRESHOLD, 2**26)


def _c_library() -> ctypes.CDLL | None:
    """The GNU C library of this process, whose allocator can be told what to keep; None on other systems."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def resident_growth(step: Callable[[], None]) -> int | None:
    """By how much the resident memory of this process rises at most, in bytes; None where the system does not tell."""
    gc.collect()
    if (c_library := _c_library()) is not None:
        c_library.malloc_trim(0)  # a resident hole of the heap would otherwise serve tensors without any growth
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        step()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(name: str) -> int:
    """A line of this process's ``status`` under Linux, in bytes."""
    return 1024 * _number(Path("/proc/self/status"), f"{name}:")


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the machine, and of the control groups it is in (a container, a job).

    What the system holds of files, to give it up when asked, is free. 0 where the system does not tell.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    try:
        free = [1024 * _number(root / "proc/meminfo", "MemAvailable:")]
        groups = [line.split(":", 2)[1:] for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except (OSError, StopIteration):
        return 0
    top = root / "sys/fs/cgroup"
    for kind, path in groups:
        if kind not in _GROUP_FILES:
            continue
        limit, used, files = _GROUP_FILES[kind]
        place = top / kind / path.lstrip("/")
        for group in (place, *place.parents):  # a limit of any of them holds; in a container only the top may be there
            if group.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError, StopIteration):  # "max" is no number
                    most = int((group / limit).read_text())
                    free.append(most - int((group / used).read_text()) + _number(group / "memory.stat", files))
    return max(0, min(free))


# Controllers of a line of /proc/self/cgroup (none in version 2) -> files of the limit and of the use, entry of files.
_GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _number(path: Path, name: str) -> int:
    """The number after ``name`` at the beginning of a line."""
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[:1] == [name])
