"""Whatever is written as settings is read as what it means, or refused by a typed error."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localgrad.config import Config, dump, validate
from localgrad.errors import ConfigError
from localgrad.recipes import override, read_recipe, safe_yaml
from localgrad.spec import build_method
from localgrad.tasks import classification
from localgrad.train.parallel import parsed

KEYS = [
    f"{section.name}.{setting.name}"
    for section in dataclasses.fields(Config)
    if section.name in ("model", "data", "blocks", "optim", "train")
    for setting in dataclasses.fields(section.default_factory)
]
WORDS = (
    "0.1|'0.1'|1e-3|1e-300|1e400|yes|on|'true'|1|0|-1|2147483648|100000000000000000000|.nan|.inf|-.inf|null|~|[]|{}|[1,2]|"
    "[1.0,.nan]|2024-99-99|2024-01-01|010|0o10|0x1|1:30|!!int|!!int x|!!set|&a|*a|<<|=|?|-|:|[[[[|{<<: 1}|text"
)
ODD = st.sampled_from(WORDS.split("|"))
MARKS = st.sampled_from("abe0123456789.-+_:,[]{}&*!'\"<>=? \n#|%~")
TEXT = st.one_of(ODD, st.text(MARKS, max_size=30), st.text(max_size=20))


def read(assignments: list[str]) -> Config | None:
    try:
        return validate(override({"method": ["dgl"]}, assignments), "here")
    except ConfigError:
        return None


def is_sound(config: Config) -> None:
    """A file of its own reads back the same, and no number in it is out of reach."""
    assert validate(safe_yaml(dump(config)), "again") == config
    for section in (config.optim, config.train, config.data):
        for value in dataclasses.asdict(section).values():
            assert not isinstance(value, float) or math.isfinite(value)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KEYS), TEXT), max_size=2))
def test_any_override_gives_settings_or_a_typed_error(given_: list[tuple[str, str]]) -> None:
    if (config := read([f"{key}={text}" for key, text in given_])) is not None:
        is_sound(config)


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40))
def test_any_word_in_place_of_an_override(word: str) -> None:
    read([word])


TREES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(KEYS), inner),
    max_leaves=5,
)
SETTINGS = st.dictionaries(
    st.sampled_from([f.name for f in dataclasses.fields(Config)] + ["extends"]),
    st.dictionaries(st.sampled_from([key.partition(".")[2] for key in KEYS]), TREES, max_size=3) | TREES,
    max_size=4,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(TEXT, st.text(max_size=200), SETTINGS.map(yaml.safe_dump), st.binary(max_size=40)))
def test_any_file_gives_settings_or_a_typed_error(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode(errors="surrogatepass") if isinstance(content, str) else content)
    try:
        config = validate({"method": ["dgl"], **read_recipe(str(path))}, "here")
    except ConfigError:
        return
    is_sound(config)


@pytest.mark.parametrize(
    ("text", "value"),
    [("'0.1'", 0.1), ("1e-3", 1e-3), ("1e3", 1e3), (".5", 0.5), ("+.5e1", 5.0), ("3", 3.0)],
)
def test_numbers_are_read_as_they_are_meant(text: str, value: float) -> None:
    config = read([f"optim.lr={text}"])
    assert config is not None and config.optim.lr == value


@pytest.mark.parametrize("text", ["yes", "on", "true", "'true'", "'yes'"])
def test_words_for_booleans(text: str) -> None:
    config = read([f"train.compile={text}"])
    assert config is not None and config.train.compile is True


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("optim.lr=true", r"optim\.lr=True.*number"),
        ("data.image_size=[true, 32]", r"data\.image_size.*number"),
        ("train.epochs=010", "leading 0"),
        ("train.epochs=1:30", "whole number"),
        ("data.validation=.nan", r"data\.validation=nan.*\[0, 1\)"),
        ("data.workers=-1", r"data\.workers=-1.*at least 0"),
        ("data.limit=-1", r"data\.limit=-1.*at least 1"),
        ("data.scale=[.nan, 1]", r"data\.scale.*positive"),
        ("train.threads=2147483648", r"train\.threads=2147483648.*at most 1024"),
        ("train.batch_size=100000000000000000000", r"train\.batch_size=1.*at most"),
        ("optim.clip_grad=.inf", r"optim\.clip_grad=inf"),
        ("optim.lr=!!int abc", r"optim\.lr.*whole number"),
        ("optim.lr=!!float abc", "does not suit its tag"),
        ("model.options=&a {x: *a}", "levels"),
        ("optim.lr=" + "[" * 3000, "levels"),
        ("train.epochs=" + "9" * 5000, "whole number"),
        ("a" + ".a" * 5000 + "=1", "is no setting"),
    ],
)
def test_what_is_out_of_reach_is_refused(assignment: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(override({"method": ["dgl"]}, [assignment]), "here")


def test_alias_bombs_are_refused_before_they_are_written_out() -> None:
    lists = "a0: &a0 [x]\n" + "".join(f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 10)}]\n" for k in range(12))
    merged = "a0: &a0 {x: 1}\n" + "".join(
        f"a{k + 1}: &a{k + 1} {{<<: [{', '.join([f'*a{k}'] * 10)}]}}\n" for k in range(12)
    )
    for bomb in (lists, merged):
        with pytest.raises(yaml.YAMLError, match="aliases"):
            safe_yaml(bomb)


def test_a_recipe_that_extends_itself_by_another_path(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "mine.yaml").write_text("extends: sub/../mine.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        read_recipe(str(tmp_path / "mine.yaml"))


def test_booleans_are_no_numbers_of_methods_either() -> None:
    with pytest.raises(ConfigError, match=r"method\.windows\.width=True"):
        build_method(["dgl", {"windows": {"width": True}}], classification(3))


@pytest.mark.parametrize(
    "layout", ["timeout=nan", "timeout=inf", "timeout=" + "9" * 400, "data=" + "9" * 5000, "data=0"]
)
def test_layouts_out_of_reach(layout: str) -> None:
    with pytest.raises(ConfigError, match="is none of"):
        parsed(layout)


def test_a_plain_value_stays_what_it_is() -> None:
    found: Any = safe_yaml("{a: 2024-01-01, b: null, c: [1, 0x10, -2], d: on, e: 1e-3, f: &x {g: 1}, h: *x}")
    assert found == {
        "a": "2024-01-01", "b": None, "c": [1, 16, -2], "d": True, "e": 0.001, "f": {"g": 1}, "h": {"g": 1}
    }  # fmt: skip
