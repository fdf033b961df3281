"""`localgrad predict` answers from files that training wrote, or says which file is wrong and why."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from localgrad import cli, sealed
from localgrad.errors import CheckpointError, LocalgradError
from localgrad.train.predict import load_trained, predict


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run on digits, and a picture beside it."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    words = "train digits beside=[] --epochs 1 train.threads=1 data.limit=100 train.batch_size=48 --run-dir"
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), str(folder)])
    assert not stop.value.code
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


def answer(folder: Path) -> str:
    (found,) = predict(load_trained(folder), [folder / "picture.png"])
    return found.summary


@pytest.fixture
def changed(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just(10**30)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return found + [place for key, value in children for place in places(value, (*path, key))]


def sealed_or_not(result: Any, fitted: bool) -> str:
    """A result with the digest that fits, where JSON has a form for it, or with whatever it says."""
    try:
        return sealed.json_text(result) if fitted else json.dumps(result)
    except ValueError:  # a number that is none
        return json.dumps(result)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_result_gives_the_same_answer_or_a_typed_error(changed: Path, data: st.DataObject) -> None:
    """Whatever is dropped, replaced or of another type; also where the digest was made to fit."""
    file = changed / "result.json"
    original = file.read_text(encoding="utf-8")
    want = answer(changed)
    result = json.loads(original)
    place = data.draw(st.sampled_from([p for p in places(result) if p]))
    inside = copy.deepcopy(result)
    holder: Any = inside
    for key in place[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        del holder[place[-1]]
    else:
        holder[place[-1]] = data.draw(VALUES)
    fitted = data.draw(st.booleans())
    if fitted:
        inside.pop("sha256", None)
    file.write_text(sealed_or_not(inside, fitted), encoding="utf-8")
    try:
        found = answer(changed)
    except LocalgradError as error:
        assert str(file) in str(error) or str(changed) in str(error)
    else:
        assert fitted or found == want
    finally:
        file.write_text(original, encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"trained_on": []}', '{"trained_on": 3}', "[" * 10**5, "\x00"]
)
def test_a_result_of_another_form_is_refused(changed: Path, text: str) -> None:
    (changed / "result.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"result\.json"):
        load_trained(changed)


def test_normalization_of_another_number_of_channels_is_refused(changed: Path) -> None:
    file = changed / "result.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    del result["sha256"]
    result["trained_on"]["mean"] = []
    file.write_text(sealed.json_text(result), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"result\.json is damaged, trained_on: Value error, mean=\[\] and std="):
        load_trained(changed)


@pytest.mark.parametrize("number", [2, 9, 11, 2**19])
def test_classes_that_disagree_with_the_weights_are_refused(changed: Path, number: int) -> None:
    file = changed / "result.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    del result["sha256"]
    result["trained_on"]["classes"] = ["a"] * number
    file.write_text(sealed.json_text(result), encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_trained(changed)


def test_weights_that_are_wrong_are_refused(changed: Path) -> None:
    file = changed / "model.safetensors"
    weights = load_file(file)
    name = next(name for name, tensor in weights.items() if tensor.dim() == 4)
    for wrong, words in (
        ({**weights, name: torch.full_like(weights[name], float("nan"))}, "not finite"),
        ({**weights, name: weights[name][:1].clone()}, "does not fit"),
        ({**weights, "more": torch.zeros(2)}, "more"),
        ({k: v for k, v in weights.items() if k != name}, name),
    ):
        file.write_bytes(sealed.tensors_data(wrong))
        with pytest.raises(CheckpointError, match=words) as caught:
            load_trained(changed)
        assert str(file) in str(caught.value)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is torn"):
        load_trained(changed)
