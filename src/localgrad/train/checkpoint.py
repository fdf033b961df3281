"""One file that holds all a run needs to go on: written atomically, checked in full, loaded without running code.

The file is a safetensors file. Its tensors are the tensors of the state; its metadata hold the state's tree as JSON, a
format tag and a sha256 over the tree and every tensor, so a torn or altered file is refused rather than half loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from localgrad.errors import CheckpointError

FORMAT = "localgrad-checkpoint/1"

# What every supported safetensors version stores as itself. Other dtypes (complex, float8, uint16, ...) are stored as
# their bytes, and the tree says what they are.
_NATIVE = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def previous(path: str | os.PathLike[str]) -> Path:
    """Where `save` keeps the checkpoint that ``path`` held before: ``<name>.previous`` beside it."""
    path = Path(path)
    return path.with_name(path.name + ".previous")


def save(path: str | os.PathLike[str], state: object) -> None:
    """Write ``state`` to ``path`` so that a crash, a kill or a full disk at any moment leaves a loadable checkpoint.

    The new file is complete and on disk before it takes the name ``path``; what ``path`` held before is then kept as
    ``<name>.previous`` (see `load_latest`).

    Args:
        path: the file; missing folders are made. One process at a time may save to it.
        state: a tree of dict (str or int keys), list, tuple, tensor (any shape, dtype and device, strided), int, float,
            bool, str and None. Loading gives the same values bit for bit. Tensors come back detached and each in
            memory of its own, also where they shared storage; an ``OrderedDict`` comes back as a dict.

    Raises:
        CheckpointError: a value cannot be saved (the message names its place in the tree) or the file cannot be
            written. Unless the message says that the new file is in place, the earlier files are as they were.

    Example:
        >>> import tempfile, torch
        >>> from localgrad.train import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(f"{folder}/run", {"step": 3, "weights": {0: torch.zeros(2)}})
        ...     checkpoint.load(f"{folder}/run")
        {'step': 3, 'weights': {0: tensor([0., 0.])}}
    """
    path = Path(path)
    new, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".previous.partial")
    data = _serialize(state)
    placed = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(new, data)
        has_old = path.exists()
        if has_old:
            _duplicate(path, old)
        # From here on the order matters. `path` is always the old or the new file, never absent, and `.previous` is
        # touched only once the new file stands: should the old one be damaged, the good `.previous` has done its duty.
        os.replace(new, path)
        placed = True
        _sync_folder(path.parent)
        if has_old:
            os.replace(old, previous(path))
            _sync_folder(path.parent)
    except OSError as error:
        outcome = "the new file is in place, but may not survive a power cut" if placed else "nothing was replaced"
        raise CheckpointError(
            f"could not save the checkpoint {path}: {error}; {outcome}. Free space on the disk, or save elsewhere."
        ) from error
    finally:
        # After success there are none. What a killed process leaves behind is overwritten by the next save.
        for leftover in (new, old):
            with contextlib.suppress(OSError):
                os.unlink(leftover)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Any:
    """The state that `save` wrote to ``path``, with every tensor on ``device``. Never unpickles, never runs code.

    Raises:
        CheckpointError: the file is missing, torn, altered or not a localgrad checkpoint.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _refused(path, "does not exist") from None
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {error}; check the path and its permissions."
        ) from error
    if not data:
        raise _refused(path, "is empty")
    if data.startswith((b"PK\x03\x04", b"\x80")) and not data[8:9] == b"{":
        raise _refused(path, "is a pickle or zip file, as torch.save writes; loading those can run code")
    try:
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _refused(path, f"is torn or is no safetensors file ({error})") from error
    tag, tree, digest = (metadata.get(name) for name in ("format", "tree", "sha256"))
    if tag != FORMAT or tree is None:
        found = f"with the format tag {tag!r}" if tag else "without a format tag"
        raise _refused(path, f"is a safetensors file {found}, but only {FORMAT!r} can be resumed")
    if digest != _digest(tree, tensors):
        raise _refused(path, "was altered or damaged after it was written (its sha256 does not match)")
    # A copy even to the CPU: these tensors lie in Python's memory, whose alignment differs from that of torch's own
    # allocator, and some kernels sum in another order then.
    device = torch.device(device)
    placed = {name: tensors.pop(name).to(device, copy=True) for name in list(tensors)}
    try:
        return _decode(json.loads(tree), placed)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error) as error:
        # RecursionError is a RuntimeError. A file of ours cannot come here; one with a forged digest can.
        raise _refused(path, f"holds a tree that makes no sense ({type(error).__name__}: {error})") from error


def load_latest(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[Any, Path, str | None]:
    """`load` of ``path`` or, if that is refused, of the ``<name>.previous`` that `save` kept.

    Returns:
        the state, the path it came from, and why ``path`` itself was refused (None if it was not).

    Raises:
        CheckpointError: neither file can be loaded; gives both reasons.
    """
    path = Path(path)
    try:
        return load(path, device), path, None
    except CheckpointError as error:
        newest = error
    try:
        return load(previous(path), device), previous(path), str(newest)
    except CheckpointError as error:
        raise CheckpointError(f"neither checkpoint can be loaded. Newest: {newest} Previous: {error}") from newest


def random_states() -> dict[str, Any]:
    """The states of the global generators of torch (CPU, every CUDA device), numpy and ``random``, ready for `save`.

    Tensors are uint8 (torch) and int64 of shape (624,) (numpy), on the CPU.
    """
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(words, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "python": random.getstate(),
    }


def set_random_states(state: dict[str, Any]) -> None:
    """Put back what `random_states` returned. States of CUDA devices that this machine lacks are left out.

    Raises:
        CheckpointError: ``state`` is not such a state.
    """
    try:
        name, words, position, has_gauss, gauss = state["numpy"]
        random.setstate(state["python"])
        np.random.set_state((name, words.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
        torch.set_rng_state(state["torch"].cpu())
        for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda.cpu(), index)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"these are not the random states of a checkpoint ({type(error).__name__}: {error}); "
            "pass what random_states() returned."
        ) from error


def _refused(path: Path, what: str) -> CheckpointError:
    if not path.name.endswith(".previous") and previous(path).exists():
        advice = f"Resume from {previous(path)}, or restore the file from a copy."
    else:
        advice = "Restore the file from a copy, or start a new run without resuming."
    return CheckpointError(f"the checkpoint {path} {what}; nothing was loaded. {advice}")


def _serialize(state: object) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    try:
        tree = json.dumps(_encode(state, "state", tensors), allow_nan=False)
    except RecursionError:
        raise CheckpointError(
            "the state is nested too deeply, or contains itself; save a flat tree of dicts and lists."
        ) from None
    return safetensors.torch.save(tensors, {"format": FORMAT, "tree": tree, "sha256": _digest(tree, tensors)})


def _encode(value: object, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """``value`` as JSON. What JSON lacks becomes an object with one key that says what it is; ``tensors`` is filled.

    Types are compared exactly: a subclass (a numpy float, an enum, a named tuple) would come back as something else.
    """
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if isinstance(value, int) and kind is int:
        # Python refuses to read decimal integers of thousands of digits; hexadecimal ones have no such limit.
        return value if -(2**63) <= value < 2**63 else {"int": hex(value)}
    if isinstance(value, float) and kind is float:
        return value if value - value == 0.0 else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, place, tensors)
    if isinstance(value, list | tuple) and kind in (list, tuple):
        items = [_encode(item, f"{place}[{index}]", tensors) for index, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if isinstance(value, dict) and kind in (dict, OrderedDict):
        pairs = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"{place} has the key {key!r} of type {_name(key)}, but a checkpoint holds only str and int keys; "
                    "convert the key first."
                )
            pairs.append([_encode(key, place, tensors), _encode(item, f"{place}[{key!r}]", tensors)])
        return {"dict": pairs}
    raise CheckpointError(
        f"{place} is of type {_name(value)}, but a checkpoint holds only dict, list, tuple, torch.Tensor, int, float, "
        "bool, str and None; convert the value first."
    )


def _encode_tensor(value: torch.Tensor, place: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    plain = type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if not plain or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise CheckpointError(
            f"{place} is of type {_name(value)} (layout {value.layout}, dtype {value.dtype}, device {value.device}), "
            "but a checkpoint holds only plain strided tensors with data; convert it to one first."
        )
    name = str(len(tensors))
    # A copy: safetensors refuses tensors that overlap in memory. Not `contiguous()`, which takes a single element as it
    # is, whatever its stride, and then its bytes cannot be viewed.
    cpu = value.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    node: dict[str, Any] = {"tensor": name}
    if cpu.dtype not in _NATIVE:
        node |= {"dtype": str(cpu.dtype).removeprefix("torch."), "shape": list(cpu.shape)}
        cpu = _bytes(cpu)
    tensors[name] = cpu
    return node


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        tensor = tensors[node["tensor"]]
        if "dtype" in node:
            dtype = getattr(torch, node["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"unknown dtype {node['dtype']!r}")
            return tensor.view(dtype).reshape(node["shape"])
        return tensor
    ((kind, content),) = node.items()
    if kind == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    raise ValueError(f"unknown node {kind!r}")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _digest(tree: str, tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over format, tree, and name, dtype, shape and bytes of every tensor, each preceded by its length."""
    digest = hashlib.sha256()

    def add(data: bytes | memoryview) -> None:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)

    add(FORMAT.encode())
    add(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        add(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        add(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write ``data`` and wait until it is on disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _duplicate(source: Path, target: Path) -> None:
    """A second name for the file ``source`` or, on file systems without hard links, a copy that is on disk."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb+") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk; only POSIX systems can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
