"""Checkpoints: exact round trips, and no way to lose the last good file or to load a bad one."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import struct
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from localgrad.errors import CheckpointError
from localgrad.train import checkpoint

QUIET_NAN_WITH_PAYLOAD = struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0]


def assert_same(given: Any, loaded: Any) -> None:
    """Same types, values and bits, all the way down."""
    if isinstance(given, torch.Tensor):
        assert type(loaded) is torch.Tensor
        assert (loaded.dtype, loaded.shape) == (given.dtype, given.shape)
        assert loaded.is_contiguous() and not loaded.requires_grad
        given = given.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        assert torch.equal(given.view(-1).view(torch.uint8), loaded.view(-1).view(torch.uint8))
    elif isinstance(given, dict):
        assert type(loaded) is dict
        assert [(type(k), k) for k in loaded] == [(type(k), k) for k in given]
        for key in given:
            assert_same(given[key], loaded[key])
    elif isinstance(given, list | tuple):
        assert type(loaded) is type(given) and len(loaded) == len(given)
        for one, other in zip(given, loaded, strict=True):
            assert_same(one, other)
    elif isinstance(given, float):
        assert type(loaded) is float and struct.pack(">d", loaded) == struct.pack(">d", given)
    else:
        assert type(loaded) is type(given) and loaded == given


def optimizer_state(kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        schedule.step()
    state = optimizer.state_dict()
    assert all(type(key) is int for key in state["state"])
    return {"model": model.state_dict(), "optimizer": state, "schedule": schedule.state_dict(), "step": 3}


def shared() -> list[torch.Tensor]:
    base = torch.arange(12.0)
    return [base, base, base[3:7], base.view(3, 4).t(), base.expand(2, 12), base[::2]]


# complex32 is left out only because torch warns wherever it is used.
NATIVE_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
OTHER_DTYPES = "float8_e4m3fn float8_e5m2 uint16 uint32 uint64 complex64 complex128"
ALL_DTYPES = [getattr(torch, name) for name in f"{NATIVE_DTYPES} {OTHER_DTYPES}".split()]

CASES: dict[str, Any] = {
    "empty": {},
    "none": None,
    "scalar": 7,
    "containers": {"a": [1, (2, [3, ()], {}), []], "b": ({"tensor": 0, "dict": [], "tuple": ()},), "": {"": None}},
    "int keys": {0: "int", "0": "str", -5: 1, 2**70: 2, "é\ud800\n\"\\": 3},
    "ints": [0, -1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**5000],
    "floats": [0.0, -0.0, 0.1, 1e22, 5e-324, float("inf"), -float("inf"), float("nan"), QUIET_NAN_WITH_PAYLOAD],
    "bools": [True, False, 1, 0],
    "dtypes": [torch.arange(-3, 3).to(torch.float32).abs().to(dtype) for dtype in ALL_DTYPES],
    "no dimensions": [torch.tensor(1.5), torch.tensor(True), torch.tensor(1j), torch.tensor(3, dtype=torch.bfloat16)],
    "no elements": [torch.empty(0), torch.empty(2, 0, 3, dtype=torch.complex128)],
    "layouts": [torch.arange(6).view(2, 3).t(), torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)],
    "shared": shared(),
    "lazy": [torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag, torch._neg_view(torch.ones(2))],
    "bits": [
        torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, -1], dtype=torch.int32).view(torch.float32),
        torch.tensor([0x7FC1, 0x7F81, -0x8000], dtype=torch.int16).view(torch.bfloat16),
    ],
    "parameters": [torch.nn.Parameter(torch.ones(3)), torch.nn.Buffer(torch.ones(3)), torch.nn.Linear(2, 1).weight * 2],
    "random": checkpoint.random_states(),
    "sgd": optimizer_state("sgd"),
    "adamw": optimizer_state("adamw"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "new" / "folder" / "run", CASES[name])
    assert_same(CASES[name], checkpoint.load(tmp_path / "new" / "folder" / "run"))
    assert os.listdir(tmp_path / "new" / "folder") == ["run"]


def test_ordered_dicts_come_back_as_dicts_and_tensors_in_their_own_memory(tmp_path: Path) -> None:
    weight = torch.ones(3)
    checkpoint.save(tmp_path / "run", OrderedDict(a=weight, b=weight))
    loaded = checkpoint.load(str(tmp_path / "run"))
    loaded["a"].zero_()
    assert type(loaded) is dict and loaded["b"].sum() == 3 and weight.sum() == 3
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda(tmp_path: Path) -> None:
    state: dict[str, Any] = {"weight": torch.randn(5, device="cuda"), "random": checkpoint.random_states()}
    checkpoint.save(tmp_path / "run", state)
    loaded = checkpoint.load(tmp_path / "run", device="cuda")
    assert loaded["weight"].is_cuda and torch.equal(loaded["weight"], state["weight"])
    before = torch.randn(3, device="cuda")
    checkpoint.set_random_states(loaded["random"])
    assert torch.equal(torch.randn(3, device="cuda"), before)


def test_load_places_tensors_on_the_device(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "run", {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.uint16)})
    assert {tensor.device.type for tensor in checkpoint.load(tmp_path / "run", device="meta").values()} == {"meta"}


def test_the_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "run", {"weight": torch.arange(3.0), "step": 1})
    with safetensors.safe_open(tmp_path / "run", framework="pt") as file:
        assert torch.equal(file.get_tensor("0"), torch.arange(3.0))
        assert file.metadata()["format"] == "localgrad-checkpoint/1"
        assert json.loads(file.metadata()["tree"]) == {"dict": [["weight", {"tensor": "0"}], ["step", 1]]}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": [1, {"b": {1, 2}}]}, ["state['a'][1]['b']", "of type set"]),
        ({3: (object(),)}, ["state[3][0]", "of type object"]),
        ({"lr": np.float64(0.1)}, ["state['lr']", "numpy.float64"]),
        ({"a": np.zeros(2)}, ["state['a']", "numpy.ndarray"]),
        ({"a": Counter("abc")}, ["state['a']", "Counter"]),
        ({"size": torch.Size([2])}, ["state['size']", "torch.Size"]),
        ({"a": {True: 1}}, ["state['a']", "key True", "bool"]),
        ({"a": {(0, 1): 1}}, ["state['a']", "key (0, 1)", "tuple"]),
        ({"a": torch.empty(2, device="meta")}, ["state['a']", "device meta"]),
        ({"a": torch.eye(2).to_sparse()}, ["state['a']", "torch.sparse_coo"]),
        (len, ["state is of type", "builtin_function_or_method"]),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(state: object, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        checkpoint.save(tmp_path / "run", state)
    assert all(word in str(error.value) for word in words), error.value
    assert os.listdir(tmp_path) == []


def test_a_state_that_contains_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(CheckpointError, match="contains itself"):
        checkpoint.save(tmp_path / "run", state)


def test_random_states_round_trip(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [torch.randn(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()]

    draw()  # an odd number of normal draws, so that cached second ones are part of the state
    checkpoint.save(tmp_path / "run", checkpoint.random_states())
    expected = [draw(), draw()]
    checkpoint.set_random_states(checkpoint.load(tmp_path / "run"))
    assert [draw(), draw()] == expected


@pytest.mark.parametrize("state", [{}, None, {"torch": 1, "cuda": [], "numpy": (1, 2, 3, 4, 5), "python": ()}])
def test_foreign_random_states_are_refused(state: Any) -> None:
    before = checkpoint.random_states()
    with pytest.raises(CheckpointError, match="not the random states"):
        checkpoint.set_random_states(state)
    assert_same(before, checkpoint.random_states())


# --- writing -----------------------------------------------------------------------------------------------------


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((64,), float(step))}


def test_the_file_before_is_kept_as_previous(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    for step in range(4):
        checkpoint.save(path, state_of(step))
        assert checkpoint.load(path)["step"] == step
        if step:
            assert checkpoint.load(checkpoint.previous(path))["step"] == step - 1
    assert sorted(os.listdir(tmp_path)) == ["run.safetensors", "run.safetensors.previous"]


class Killed(BaseException):
    """Ends the process, as far as the code under test can tell."""


SYSTEM_CALLS = ("open", "write", "fsync", "link", "replace", "unlink")


def break_at(monkeypatch: pytest.MonkeyPatch, call: int, failure: type[BaseException] | None) -> list[str]:
    """Fail at system call number ``call``. A `Killed` process makes no further ones; an OSError hits just that one."""
    made: list[str] = []

    def breaking(name: str) -> Any:
        real = getattr(os, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            number = len(made) - 1
            if failure is Killed and number >= call:
                if number == call and name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])  # torn in the middle
                raise Killed
            if failure is not None and number == call:
                raise OSError(errno.EIO, "input/output error")
            return real(*args, **kwargs)

        return wrapped

    for name in SYSTEM_CALLS:
        monkeypatch.setattr(os, name, breaking(name))
    return made


def number_of_system_calls(path: Path) -> int:
    checkpoint.save(path, state_of(0))
    with pytest.MonkeyPatch.context() as patch:
        made = break_at(patch, -1, None)
        checkpoint.save(path, state_of(1))
    assert {"write", "fsync", "link", "replace"} <= set(made)
    return len(made)


@pytest.mark.parametrize(("earlier", "damaged"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("failure", [Killed, OSError])
def test_a_failure_at_any_step_loses_nothing(
    earlier: int, damaged: bool, failure: type[BaseException], tmp_path: Path
) -> None:
    for call in range(number_of_system_calls(tmp_path / "count")):
        path = tmp_path / str(call) / "run"
        for step in range(earlier):
            checkpoint.save(path, state_of(step))
        if damaged:
            path.write_bytes(path.read_bytes()[:-1])
        good = earlier - 1 - damaged
        with pytest.MonkeyPatch.context() as patch:
            break_at(patch, call, failure)
            try:
                checkpoint.save(path, state_of(earlier))
                message = None  # an error while cleaning up loses nothing and is not reported
            except (Killed, CheckpointError) as error:
                message = str(error)
        if failure is OSError and message is not None:
            assert not [name for name in os.listdir(path.parent) if name.endswith(".partial")]
        state, _, _ = checkpoint.load_latest(path)
        assert state["step"] in (good, earlier)
        assert_same(state_of(state["step"]), state)
        if message is None or "in place" in message:
            assert state["step"] == earlier
        elif failure is OSError:
            assert state["step"] == good and "nothing was replaced" in message and str(path) in message
        # The next save works, whatever lies around, and leaves nothing behind.
        checkpoint.save(path, state_of(9))
        assert checkpoint.load(path)["step"] == 9
        assert sorted(os.listdir(path.parent)) == ["run", "run.previous"]
        if not damaged or state["step"] == earlier:
            checkpoint.load(checkpoint.previous(path))


def test_a_full_disk_leaves_the_earlier_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    checkpoint.save(path, state_of(0))
    checkpoint.save(path, state_of(1))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    real, room = os.write, [300]

    def write(descriptor: int, data: Any) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(descriptor, data[: room[0]])  # a short write first, as on a real disk
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CheckpointError, match=r"No space left on device.*nothing was replaced"):
        checkpoint.save(path, state_of(2))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_without_hard_links_the_previous_file_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    for step in range(3):
        checkpoint.save(tmp_path / "run", state_of(step))
    assert checkpoint.load(tmp_path / "run")["step"] == 2
    assert checkpoint.load(tmp_path / "run.previous")["step"] == 1


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "run"
    checkpoint.save(path, optimizer_state("adamw"))
    return path.read_bytes()


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and "nothing was loaded" in message
    assert all(word in message for word in words), message


def test_torn_files_are_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run"
    for length in sorted({*range(20), *range(20, len(good), len(good) // 60), len(good) - 1}):
        path.write_bytes(good[:length])
        assert_refused(path)
    path.write_bytes(good + b" ")
    assert_refused(path)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF], ids=hex)
def test_a_changed_byte_is_refused(good: bytes, mask: int, tmp_path: Path) -> None:
    path = tmp_path / "run"
    start = 8 + int.from_bytes(good[:8], "little")
    assert 500 < start < len(good) - 300
    spread = {*range(10), *range(0, len(good), len(good) // 60), start - 1, start, start + 1, len(good) - 1}
    # Every byte of the tag and the digest, too.
    for word in (b"format", b"sha256", b"localgrad-checkpoint"):
        spread |= set(range(good.index(word), good.index(word) + len(word) + 20))
    for position in sorted(spread):
        data = bytearray(good)
        data[position] ^= mask
        path.write_bytes(data)
        assert_refused(path)
    path.write_bytes(good)
    checkpoint.load(path)


def rewrite(path: Path, metadata: dict[str, str] | None, tensors: dict[str, torch.Tensor] | None = None) -> None:
    path.write_bytes(safetensors.torch.save({"0": torch.ones(2)} if tensors is None else tensors, metadata))


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert_refused(path, "does not exist", "start a new run")
    path.write_bytes(b"")
    assert_refused(path, "is empty")
    path.write_text("step: 3\n" * 10)
    assert_refused(path, "no safetensors file")
    path.write_bytes(pickle.dumps({"step": 3}))
    assert_refused(path, "is a pickle")
    torch.save({"weight": torch.ones(2)}, path)
    assert_refused(path, "is a pickle or zip file")
    rewrite(path, None)
    assert_refused(path, "without a format tag", "localgrad-checkpoint/1")
    rewrite(path, {"format": "pt"})
    assert_refused(path, "format tag 'pt'")
    rewrite(path, {"format": "localgrad-checkpoint/2", "tree": "{}", "sha256": ""})
    assert_refused(path, "localgrad-checkpoint/2")
    rewrite(path, {"format": "localgrad-checkpoint/1", "tree": "1"})
    assert_refused(path, "sha256 does not match")
    header = b'{"__metadata__":null}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert_refused(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        checkpoint.load(path)


def test_swapped_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    checkpoint.save(path, [torch.zeros(2), torch.ones(2)])
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rewrite(path, metadata, tensors)
    checkpoint.load(path)
    swapped = {"0": tensors["1"], "1": tensors["0"]}
    reshaped = {**tensors, "0": tensors["0"].view(1, 2)}
    retyped = {**tensors, "0": tensors["0"].view(torch.int32)}
    for change in (swapped, reshaped, retyped, {"0": tensors["0"]}, {**tensors, "2": torch.ones(1)}):
        rewrite(path, metadata, change)
        assert_refused(path, "sha256 does not match")


@pytest.mark.parametrize(
    "tree",
    ["", "[", '{"evil": 1}', "{}", '{"tensor": "9"}', '{"tensor": "0", "dtype": "nn", "shape": [2]}', '{"float": "00"}',
     '{"tensor": "0", "dtype": "float64", "shape": [5]}', '{"dict": [1]}', '{"dict": [[[], 1]]}', '{"int": 3}',
     '{"tensor": []}', "[" * 100_000],
    ids=lambda tree: tree[:40],
)  # fmt: skip
def test_forged_trees_are_refused(tree: str, tmp_path: Path) -> None:
    tensors = {"0": torch.ones(2)}
    metadata = {"format": checkpoint.FORMAT, "tree": tree, "sha256": checkpoint._digest(tree, tensors)}
    rewrite(tmp_path / "run", metadata, tensors)
    assert_refused(tmp_path / "run", "makes no sense")


def test_load_latest_falls_back_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"neither.*Newest:.*does not exist.*Previous:.*does not exist"):
        checkpoint.load_latest(path)
    checkpoint.save(path, state_of(0))
    checkpoint.save(path, state_of(1))
    state, used, reason = checkpoint.load_latest(path)
    assert (state["step"], used, reason) == (1, path, None)

    path.write_bytes(path.read_bytes()[:-3])
    assert_refused(path, f"Resume from {checkpoint.previous(path)}")
    state, used, reason = checkpoint.load_latest(path)
    assert (state["step"], used) == (0, checkpoint.previous(path))
    assert reason is not None and "torn" in reason
    path.unlink()
    assert checkpoint.load_latest(path)[0]["step"] == 0

    checkpoint.previous(path).write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"neither.*does not exist.*no safetensors file"):
        checkpoint.load_latest(path)


def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()

    model, optimizer = build()
    steps(model, optimizer)
    checkpoint.save(
        tmp_path / "run",
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": checkpoint.random_states()},
    )
    steps(model, optimizer)

    resumed, resumed_optimizer = build()
    state = checkpoint.load(tmp_path / "run")
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    checkpoint.set_random_states(state["random"])
    steps(resumed, resumed_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
