"""Files that are written wholly or not at all, and that tell whether they are still what was written.

Each carries a sha256 of its content: an altered, torn or exchanged byte is found when it is read. The digest has no
key, so it is no protection against somebody who means to deceive.

    JSON          a key "sha256" over all others
    YAML          a last line "# sha256: ..." over those before it
    safetensors   a metadatum "sha256" over names, dtypes, shapes and bytes of the tensors
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from localgrad.errors import CheckpointError

MARK = "# sha256: "
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


def write(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, so that after a kill or a power cut it is the old one or the new one.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; free some space, or write to another place"
        ) from error


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk; where the system cannot do that, names last as long as it does."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: Path) -> bytes:
    """The content of a file.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def json_text(content: Mapping[str, Any]) -> str:
    """A sealed JSON object."""
    return json.dumps({**content, "sha256": _of_json(content)}, indent=1, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """What `json_text` was given.

    Raises:
        CheckpointError: the file is missing, damaged, or was not sealed.
    """
    try:
        content = json.loads(read(path))
        digest = content.pop("sha256")
        same = digest == _of_json(content)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); restore it from a copy") from error
    if not same:
        raise _altered(path)
    return dict(content)


def yaml_text(content: str) -> str:
    """A sealed YAML document; the seal is a comment."""
    return f"{content}{MARK}{hashlib.sha256(content.encode()).hexdigest()}\n"


def read_yaml(path: Path) -> str:
    """The document that `yaml_text` was given.

    Raises:
        CheckpointError: the file is missing, damaged, or was not sealed.
    """
    text = read(path).decode(errors="replace")
    content, mark, digest = text.rpartition(MARK)
    if not mark or digest != hashlib.sha256(content.encode()).hexdigest() + "\n":
        raise _altered(path)
    return content


def tensors_data(tensors: Mapping[str, Tensor]) -> bytes:
    """A sealed safetensors file, which other programs read too."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(plain, {"sha256": _of_tensors(plain)})  # one entry: safetensors writes several in any order


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What `tensors_data` was given, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or was not sealed.
    """
    data = read(path)
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        digest = metadata.get("sha256")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is torn or is no safetensors file ({error})") from error
    if digest != _of_tensors(tensors):
        raise _altered(path)
    return tensors


def file_digest(path: Path) -> str:
    """sha256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _altered(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} was altered or damaged after it was written (its sha256 does not match); restore it from a copy"
    )


def _of_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()


def _of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, each preceded by its length."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        for data in (f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), _bytes(tensor).numpy().data):
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


def encode(value: object, tensors: dict[str, Tensor], place: str = "state") -> Any:
    """A tree as JSON, see `decode`.

    Args:
        value: a tree of dict (str or int keys), list, tuple, tensor (any shape, dtype and device, strided), int, float,
            bool, str and None. An ``OrderedDict`` comes back as a dict, tensors each in memory of their own.
        tensors: gets the tensors by number.
        place: what to call the tree in a message.

    Raises:
        CheckpointError: a value cannot be saved; the message names its place in the tree.
    """
    try:
        return _encode(value, tensors, place)
    except RecursionError:
        raise CheckpointError(
            f"{place} is nested too deeply, or contains itself; save a flat tree of dicts and lists."
        ) from None


def _encode(value: object, tensors: dict[str, Tensor], place: str) -> Any:
    """What JSON lacks becomes an object with one key that says what it is.

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
    if isinstance(value, Tensor):
        return _encode_tensor(value, place, tensors)
    if isinstance(value, list | tuple) and kind in (list, tuple):
        items = [_encode(item, tensors, f"{place}[{index}]") for index, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if isinstance(value, dict) and kind in (dict, OrderedDict):
        pairs = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"{place} has the key {key!r} of type {_name(key)}, but a checkpoint holds only str and int keys; "
                    "convert the key first."
                )
            pairs.append([_encode(key, tensors, place), _encode(item, tensors, f"{place}[{key!r}]")])
        return {"dict": pairs}
    raise CheckpointError(
        f"{place} is of type {_name(value)}, but a checkpoint holds only dict, list, tuple, torch.Tensor, int, float, "
        "bool, str and None; convert the value first."
    )


def _encode_tensor(value: Tensor, place: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
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


def decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `encode` was given.

    Raises:
        ValueError, KeyError, TypeError: it makes no sense.
    """
    if isinstance(node, list):
        return [decode(item, tensors) for item in node]
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
        return {decode(key, tensors): decode(item, tensors) for key, item in content}
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in content)
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    raise ValueError(f"unknown node {kind!r}")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
