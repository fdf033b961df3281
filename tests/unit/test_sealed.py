"""Sealed files: exact round trips, and no way to lose the last good file or to read a bad one as good."""

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

import hypothesis
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from localgrad import sealed
from localgrad.errors import CheckpointError
from localgrad.randomness import random_states, set_random_states

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
    "random": random_states(),
    "sgd": optimizer_state("sgd"),
    "adamw": optimizer_state("adamw"),
}  # fmt: skip


def through_json(value: object) -> Any:
    """What comes back of a tree whose JSON was written and read."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(sealed.encode(value, tensors), allow_nan=False)
    return sealed.decode(json.loads(text), tensors)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str) -> None:
    assert_same(CASES[name], through_json(CASES[name]))


def test_ordered_dicts_come_back_as_dicts_and_tensors_in_their_own_memory() -> None:
    weight = torch.ones(3)
    loaded = through_json(OrderedDict(a=weight, b=weight))
    loaded["a"].zero_()
    assert type(loaded) is dict and loaded["b"].sum() == 3 and weight.sum() == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda() -> None:
    state: dict[str, Any] = {"weight": torch.randn(5, device="cuda"), "random": random_states()}
    loaded = through_json(state)
    assert torch.equal(loaded["weight"].cuda(), state["weight"])
    before = torch.randn(3, device="cuda")
    set_random_states(loaded["random"])
    assert torch.equal(torch.randn(3, device="cuda"), before)


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
def test_what_cannot_be_saved_is_named(state: object, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        sealed.encode(state, {})
    assert all(word in str(error.value) for word in words), error.value


def test_a_state_that_contains_itself_is_refused() -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(CheckpointError, match="contains itself"):
        sealed.encode(state, {})


def test_random_states_round_trip() -> None:
    def draw() -> list[Any]:
        return [torch.randn(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()]

    draw()  # an odd number of normal draws, so that cached second ones are part of the state
    state = through_json(random_states())
    expected = [draw(), draw()]
    set_random_states(state)
    assert [draw(), draw()] == expected


@pytest.mark.parametrize("state", [{}, None, {"torch": 1, "cuda": [], "numpy": (1, 2, 3, 4, 5), "python": ()}])
def test_foreign_random_states_are_refused(state: Any) -> None:
    before = random_states()
    with pytest.raises(CheckpointError, match="not the random states"):
        set_random_states(state)
    assert_same(before, random_states())


# --- writing -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the process, as far as the code under test can tell."""


SYSTEM_CALLS = ("open", "fsync", "replace", "unlink", "close")


def break_at(monkeypatch: pytest.MonkeyPatch, call: int, failure: type[BaseException] | None) -> list[str]:
    """Fail at system call number ``call``. A `Killed` process makes no further ones; an OSError hits just that one."""
    made: list[str] = []

    def breaking(name: str) -> Any:
        real = getattr(os, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            number = len(made) - 1
            if failure is Killed and number >= call:
                raise Killed
            if failure is not None and number == call:
                raise OSError(errno.EIO, "input/output error")
            return real(*args, **kwargs)

        return wrapped

    for name in SYSTEM_CALLS:
        monkeypatch.setattr(os, name, breaking(name))
    return made


def number_of_system_calls(path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        made = break_at(patch, -1, None)
        sealed.write(path, "new")
    assert {"fsync", "replace"} <= set(made)
    return len(made)


@pytest.mark.parametrize("failure", [Killed, OSError])
def test_a_failure_at_any_step_leaves_the_old_file_or_the_new_one(failure: type[BaseException], tmp_path: Path) -> None:
    for call in range(number_of_system_calls(tmp_path / "count")):
        path = tmp_path / str(call) / "file"
        path.parent.mkdir()
        sealed.write(path, "old")
        message = None
        with pytest.MonkeyPatch.context() as patch:
            break_at(patch, call, failure)
            try:
                sealed.write(path, "new")
            except (Killed, CheckpointError) as error:
                message = str(error)
        assert path.read_text() in (("old", "new") if failure is Killed else ("new" if message is None else "old",))
        if failure is OSError:
            assert os.listdir(path.parent) == ["file"]
            assert message is None or f"cannot write {path}: input/output error" in message
        sealed.write(path, "newer")
        assert path.read_text() == "newer" and os.listdir(path.parent) == ["file"]


JSON = {"a": [1, 2.5, None, True, "x"], "nested": {"text": "sha256"}, "small": 1e-300}
TENSORS = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}
FORMS: dict[str, tuple[Any, Any, Any]] = {
    "json": (lambda: sealed.json_text(JSON).encode(), sealed.read_json, JSON),
    "yaml": (lambda: sealed.yaml_text("a: 1\nb: [x, y]\n").encode(), sealed.read_yaml, "a: 1\nb: [x, y]\n"),
    "safetensors": (lambda: sealed.tensors_data(TENSORS), sealed.read_tensors, TENSORS),
}


def same(found: Any, content: Any) -> bool:
    if isinstance(found, dict) and all(isinstance(value, torch.Tensor) for value in found.values()):
        return found.keys() == content.keys() and all(
            found[k].dtype == content[k].dtype and torch.equal(found[k], content[k]) for k in content
        )
    return repr(found) == repr(content)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@hypothesis.settings(max_examples=150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_what_was_changed_is_refused_or_says_the_same(form: str, data: st.DataObject, tmp_path: Path) -> None:
    """Bytes that are altered, cut out, doubled or exchanged; a space between two numbers of JSON changes nothing."""
    make, reader, content = FORMS[form]
    good, path = make(), tmp_path / form
    path.write_bytes(good)
    assert same(reader(path), content)
    start = data.draw(st.integers(0, len(good) - 1))
    stop = data.draw(st.integers(start, min(len(good), start + 40)))
    bad = good[:start] + data.draw(st.binary(max_size=20)) + good[stop:]
    path.write_bytes(bad)
    try:
        assert same(reader(path), content)
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_sealed_file_is_refused(form: str, tmp_path: Path) -> None:
    _, reader, _ = FORMS[form]
    path = tmp_path / "file"
    files = [b"", b"{}", b"[1]", b"a: 1\n", b"[" * 100_000, pickle.dumps({"step": 3}), safetensors.torch.save(TENSORS)]
    for content in files:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=str(path)):
            reader(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*: No such file"):
        reader(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*: Is a directory"):
        reader(path)


def test_sealed_tensors_are_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    sealed.write(tmp_path / "weights", sealed.tensors_data(TENSORS))
    assert same(safetensors.torch.load_file(tmp_path / "weights"), TENSORS)


@pytest.mark.parametrize(
    "tree",
    ['{"evil": 1}', "{}", '{"tensor": "9"}', '{"tensor": "0", "dtype": "nn", "shape": [2]}', '{"float": "00"}',
     '{"tensor": "0", "dtype": "float64", "shape": [5]}', '{"dict": [1]}', '{"dict": [[[], 1]]}', '{"int": 3}',
     '{"tensor": []}'],
)  # fmt: skip
def test_trees_that_make_no_sense_are_refused(tree: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error)):
        sealed.decode(json.loads(tree), {"0": torch.ones(2)})
