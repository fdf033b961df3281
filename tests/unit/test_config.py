"""Settings: recipes, overrides, validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import localgrad
from localgrad import config
from localgrad.config import Config, OptimConfig, TrainConfig, dump, validate
from localgrad.data import kind_of
from localgrad.data.sources import SOURCES
from localgrad.errors import ConfigError, MethodError
from localgrad.recipes import merge, override, read_recipe, recipes
from localgrad.spec import build_method, known_methods, parse_method

TASK = localgrad.tasks.classification(10)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_validates_and_its_methods_build(name: str) -> None:
    recipe = validate(read_recipe(name), name)
    for spec in (recipe.method, *recipe.beside):
        assert build_method(spec, TASK).task is TASK
    assert (recipe.blocks.num_blocks is None) != (recipe.blocks.cuts is None)
    assert recipe.data.name in SOURCES or kind_of(recipe.data.name) != "classification"
    assert recipe.about.notes or recipe.about.paper
    assert validate(yaml.safe_load(dump(recipe)), "again") == recipe


def test_a_recipe_names_only_what_differs(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {epochs: 3, batch_size: 5}\nmethod: [dgl]\nbeside: [[e2e]]\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ntrain: {epochs: 4}\nbeside: []\n")
    (tmp_path / "shipped.yaml").write_text("extends: digits\nabout: {notes: Übung}\n", encoding="utf-8")
    mine = validate(read_recipe(str(tmp_path / "mine.yaml")), "mine")
    assert (mine.train.epochs, mine.train.batch_size, mine.beside) == (4, 5, [])
    shipped = read_recipe(str(tmp_path / "shipped.yaml"))
    assert shipped["model"] == {"name": "resnet8"} and shipped["about"] == {"notes": "Übung"}


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("optim: {lr: 0.2}\ntrain: {epochs: 1}\noptim: {weight_decay: 0.1}\n")
    with pytest.raises(ConfigError, match="key 'optim' is written twice"):
        read_recipe(str(tmp_path / "mine.yaml"))
    (tmp_path / "deep.yaml").write_text("train: {epochs: 1, epochs: 2}\n")
    with pytest.raises(ConfigError, match="key 'epochs' is written twice"):
        read_recipe(str(tmp_path / "deep.yaml"))
    with pytest.raises(ConfigError, match="is no YAML"):
        parse_method("[{dgl: {head: linear, head: 1c2f}}]")


def test_circles_and_private_recipes_are_refused(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{one}.yaml").write_text(f"extends: {other}.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        read_recipe(str(tmp_path / "a.yaml"))
    with pytest.raises(ConfigError, match="unknown recipe"):
        read_recipe("_cifar")
    assert not any(name.rpartition("/")[2].startswith("_") for name in recipes())


def test_a_recipe_that_cannot_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("{}")

    def denied(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConfigError, match=r"cannot read .*Permission denied"):
        read_recipe(str(path))


def test_overrides_are_read_as_yaml_and_merged() -> None:
    base = {"optim": {"lr": 0.1, "momentum": 0.5}, "blocks": {"num_blocks": 4}}
    found = override(
        base, ["optim.lr=1e-3", "blocks={num_blocks: null, cuts: [a, b]}", "data.root=~/x", "train.compile=yes"]
    )
    assert found == {
        "optim": {"lr": 1e-3, "momentum": 0.5}, "blocks": {"num_blocks": None, "cuts": ["a", "b"]},
        "data": {"root": "~/x"}, "train": {"compile": True},
    }  # fmt: skip
    assert base["optim"] == {"lr": 0.1, "momentum": 0.5}
    assert validate({**found, "method": ["dgl"]}, "x").optim.lr == 0.001  # YAML 1.1 takes 1e-3 for a string
    for bad in ("lr", "=3", "a..b=1", "a b=1"):
        with pytest.raises(ConfigError, match=r"is no setting; write section\.name=value"):
            override({}, [bad])
    assert merge({"a": {"b": 1}}, {"a": 5}) == {"a": 5}


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (OptimConfig, {"lr": 0.0}), (OptimConfig, {"lr": float("nan")}), (OptimConfig, {"momentum": -0.1}),
        (OptimConfig, {"weight_decay": -1.0}), (OptimConfig, {"warmup_epochs": -1}), (OptimConfig, {"clip_grad": 0.0}),
        (TrainConfig, {"epochs": 0}),
        (TrainConfig, {"checkpoint_every": 0}),
        (TrainConfig, {"ema_decay": 0.0}),
        (TrainConfig, {"eval_batch_size": 0}),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(kind: Any, wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    section = "optim" if kind is OptimConfig else "train"
    shown = list(value) if isinstance(value, tuple) else value
    with pytest.raises(ConfigError, match=rf"{section}\.{name}={str(shown)[:4]}".replace("[", r"\[")):
        kind(**wrong)
    with pytest.raises(ConfigError, match=rf"{section}\.{name}="):
        validate({"method": ["dgl"], section: wrong}, "mine")


def test_unknown_and_missing_settings() -> None:
    with pytest.raises(ConfigError, match=r"mine: method: missing; for instance"):
        validate({}, "mine")
    for section in ("model", "data", "blocks", "optim", "train", "about"):
        with pytest.raises(ConfigError, match=rf"mine: {section}\.xyzzy: unknown setting 'xyzzy'; known: "):
            validate({"method": ["dgl"], section: {"xyzzy": 1}}, "mine")
    with pytest.raises(ConfigError, match=r"mine: 0\[: unknown setting '0\['; known: about, "):
        validate({"method": ["dgl"], "0[": None}, "mine")
    with pytest.raises(
        ConfigError, match=r"mine: train\.list\[int\]: unknown setting 'list\[int\]'; known: batch_size, "
    ):
        validate({"method": ["dgl"], "train": {"list[int]": 1}}, "mine")
    with pytest.raises(ConfigError) as refused:
        validate({"method": ["dgl"], "blocks": {"cuts": {"a" * 300: 1}}}, "mine")
    assert len(str(refused.value)) < 300


def test_defaults_are_valid() -> None:
    assert validate({"method": ["dgl"]}, "defaults") == Config(method=["dgl"])


def test_methods_are_composed_from_names_and_options() -> None:
    assert parse_method("infopro + checkpointing") == ["infopro", "checkpointing"]
    method = build_method(["dgl", {"windows": {"width": 3, "local": 0.5}}], TASK)
    assert method.name == "windows(dgl)" and method.spans == localgrad.spans.Overlapping(3, 0.5, 1.0)
    assert build_method([{"dgl": None}], TASK) == build_method(["dgl"], TASK)
    assert set(known_methods()) == set(localgrad.methods.__all__)
    for spec, error, words in (
        (["windows"], ConfigError, "begin with one of"),
        (["e2e", "dgl"], ConfigError, "must come first"),
        (["e2e", "windows"], MethodError, "local base"),
        ([{"infopro": {"image": ["x"]}}], ConfigError, "method.infopro"),
        ([{"infopro": {"loss": "l2"}}], ConfigError, "'softmax' or 'contrast'"),
        ([{"windows": {}, "dgl": {}}], ConfigError, "must hold one name"),
    ):
        with pytest.raises(error, match=words):
            build_method(spec, TASK)


def test_runs_side_by_side_have_names_of_their_own() -> None:
    beside: Any = [["e2e"], [{"dgl": {}}], ["e2e", "checkpointing"], ["dgl"]]
    assert config.run_names(Config(method=["dgl"], beside=beside)) == [
        "dgl",
        "e2e",
        "dgl-2",
        "e2e+checkpointing",
        "dgl-3",
    ]
