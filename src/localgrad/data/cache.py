"""What is derived from a user's files once and kept: named by the sha256 of the source, put in place atomically."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from localgrad.errors import DataError


def folder() -> Path:
    """The user's cache folder, ``${XDG_CACHE_HOME:-~/.cache}/localgrad``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "localgrad"


def sha256(*paths: Path) -> str:
    """Hexadecimal sha256 of the contents of a file; of several, that of their digests, as it matters where one ends."""
    digests = []
    for path in paths:
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256"))
    return (
        digests[0].hexdigest()
        if len(digests) == 1
        else hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()
    )


def array(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array cached as ``name``, or else ``make()``, which is then cached if the cache folder can be written.

    A damaged cache file is made again. The result may be read-only and mapped from disk.
    """
    path = folder() / name
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    made = make()
    with contextlib.suppress(OSError), _replaced(path) as stream:
        np.save(stream, made)
    return made


def tokens(name: str, dtype: np.dtype[Any], parts: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
    """The array (N,) cached as ``name``, mapped from disk; ``parts()`` are written one after the other to make it.

    Raises:
        DataError: the cache folder cannot be written.
    """
    path = folder() / name
    if not path.is_file():
        try:
            with _replaced(path) as stream:
                for part in parts():
                    stream.write(part.astype(dtype).tobytes())
        except OSError as error:
            raise DataError(f"cannot write {path}: {error}. Set XDG_CACHE_HOME to a folder that has room.") from error
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def text(name: str, make: Callable[[], str]) -> str:
    """The text cached as ``name``, or else ``make()``, which is then cached if the cache folder can be written."""
    path = folder() / name
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8")
    made = make()
    with contextlib.suppress(OSError), _replaced(path) as stream:
        stream.write(made.encode())
    return made


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def unpacked(name: str, tars: Sequence[Path]) -> Path:
    """The cached folder ``name`` that holds what is in ``tars``; unpacks them on the first call.

    Links, devices and paths that leave the folder are refused (``tarfile``'s filter ``data``).

    Raises:
        DataError: a tar is damaged or unsafe, or the cache folder cannot be written.
    """
    path = folder() / name
    if path.is_dir():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=path.parent, suffix=".part")
        try:
            for source in tars:
                _unpack(source, temporary)
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot unpack {', '.join(map(str, tars))} into {path}: {error}. "
            "Set XDG_CACHE_HOME to a folder that can be written and has room."
        ) from error
    return path


def _unpack(source: Path, target: str) -> None:
    try:
        with tarfile.open(source) as archive:
            archive.extractall(target, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{source} is damaged or unsafe to unpack: {error}. Fetch it again.") from error
