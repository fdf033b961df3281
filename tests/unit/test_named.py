"""Models, methods, tasks and data that a user names as module:function."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from localgrad import cli, data, models, named, tasks
from localgrad.config import validate
from localgrad.errors import ConfigError, DataError
from localgrad.spec import as_code, build_method

OWN = """
import torch
from torch import nn
import localgrad
from localgrad.data import Splits

def small(num_classes, width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )

def nothing(num_classes):
    return None

def mine(task, head: str = "linear"):
    return localgrad.methods.dgl(task, head=head)

def twice(base, /):
    return base

def number(task):
    return 3

def weighted(num_classes, mean, std, label_smoothing=0.0):
    return localgrad.tasks.classification(num_classes, mean=mean, std=std, label_smoothing=label_smoothing)

def load():
    g = torch.Generator().manual_seed(0)
    items = [(torch.rand(3, 16, 16, generator=g), k % 2) for k in range(60)]
    return Splits(train=items[:40], test=items[40:], classes=("cat", "dog"))

def normalised():
    items = [(torch.full((3, 4, 4), -1.0), 0)] * 8
    return Splits(train=items, test=items, classes=("a",))

def beyond():
    items = [(torch.zeros(3, 4, 4), 2)] * 8
    return Splits(train=items, test=items, classes=("a", "b"))

class Drawn:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return torch.rand(3, 4, 4), index % 2

def drawn():
    return Splits(train=Drawn(), test=Drawn(), classes=("a", "b"))

number_of_things = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module in the current directory, which the command line alone looks into."""
    (tmp_path / "ownnets.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(named, "SEARCHED", [str(tmp_path)])
    yield
    for module in ("ownnets", "broken", "needy"):
        sys.modules.pop(module, None)


def test_the_library_does_not_look_into_the_current_directory(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "SEARCHED", [])
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    with pytest.raises(ConfigError, match="no module 'ownnets'"):
        models.create("ownnets:small")


def test_a_run_of_the_users_own(own: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, recorded by name, evaluated from what was recorded."""
    arguments = "--model ownnets:small --method ownnets:mine+ownnets:twice --data ownnets:load -k 2 --epochs 1"
    settings = "train.batch_size=10 train.threads=1 task.name=ownnets:weighted task.label_smoothing=0.1 --run-dir run"
    for words in (f"train {arguments} {settings} --json", "eval run --json", "summary --model ownnets:small -k 2"):
        with pytest.raises(SystemExit) as stop:
            cli.main(words.split())
        assert not stop.value.code, capsys.readouterr().err
        said = capsys.readouterr().out
        if words.startswith("eval"):
            told = json.loads(said)
            assert told["score"] == json.loads(Path("run/result.json").read_text())["last"]["score"]
    text = Path("run/config.yaml").read_text()
    for name in ("ownnets:small", "ownnets:mine", "ownnets:twice", "ownnets:load", "ownnets:weighted"):
        assert name in text


def test_the_example_of_the_docs_trains(own: None, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "own.md").read_text(encoding="utf-8")
    code, command = (re.findall(rf"^```{kind}\n(.*?)^```", page, re.M | re.S)[0] for kind in ("python", "sh"))
    Path("mine.py").write_text(code, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split()[1:], "train.threads=1", "--run-dir", "run"])
    sys.modules.pop("mine", None)
    assert not stop.value.code, capsys.readouterr().err
    assert json.loads(Path("run/result.json").read_text())["model"] == "mine:small"


def test_options_reach_the_function(own: None) -> None:
    model = models.create("ownnets:small", num_classes=7, width=5)
    assert isinstance(model, nn.Sequential) and model[-1].weight.shape == (7, 5)
    task = tasks.classification(3)
    spec = validate({"method": [{"ownnets:mine": {"head": "mlp"}}]}, "here").method
    assert build_method(spec, task) == build_method([{"dgl": {"head": "mlp"}}], task)
    assert as_code(spec) == "ownnets.mine(task, head='mlp')"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:small", "no module 'nowhere'"),
        ("ownnets:smal", "has no 'smal'"),
        ("ownnets:number_of_things", "is a int"),
        ("ownnets:nothing", "must return a torch.nn.Module"),
        ("ownnets:load", "num_classes"),
        ("broken:small", "ZeroDivisionError"),
        ("needy:small", "no_such_package, which is not installed"),
        ("tim:resnet-18", "unknown model library 'tim'"),
    ],
)
def test_wrong_models_are_refused(own: None, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        models.create(name)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (["ownnets:number"], "must return a localgrad.Method"),
        (["ownnets:twice"], "is a plug-in"),
        (["dgl", "ownnets:mine"], "is a base"),
        ([{"ownnets:mine": {"heads": "mlp"}}], "'heads'"),
        (["ownnets:min"], "has no 'min'"),
    ],
)
def test_wrong_methods_are_refused(own: None, spec: list[object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_method(spec, tasks.classification(3))


def test_own_data_are_split_and_keyed(own: None) -> None:
    loaded = data.load("ownnets:load", batch_size=7, validation=0.25, limit=20)
    assert loaded.train.num_samples == 15 and loaded.validation is not None and loaded.validation.num_samples == 5
    assert loaded.test.num_samples == 20 and loaded.classes == ("cat", "dog") and loaded.input_shape == (3, 16, 16)
    inputs, targets = next(loaded.test.epoch(0))
    splits = data.own.read("ownnets:load")
    want = torch.stack([splits.test[k][0] for k in range(7)])
    assert torch.equal(inputs, (want - 0.5) / 0.5) and targets.tolist() == [splits.test[k][1] for k in range(7)]


def test_own_augmentation_is_keyed(own: None) -> None:
    loaded = data.load("ownnets:drawn", batch_size=4, validation=0.25, seed=3)
    for loader in (loaded.train, loaded.validation, loaded.test):
        assert loader is not None
        first, again = (torch.cat([x for x, _ in loader.epoch(1)]) for _ in range(2))
        assert torch.equal(first, again)
    train = [torch.cat([x for x, _ in loaded.train.epoch(epoch)]) for epoch in (1, 2)]
    assert not torch.equal(*train)


def test_wrong_data_are_refused(own: None) -> None:
    with pytest.raises(ConfigError, match=r"must return a localgrad\.data\.Splits"):
        data.load("ownnets:Drawn", batch_size=2)
    with pytest.raises(ConfigError, match="up to the function"):
        data.load("ownnets:load", batch_size=2, image_size=8)
    with pytest.raises(DataError, match="not normalised"):
        data.load("ownnets:normalised", batch_size=2)
    with pytest.raises(DataError, match="its class is 2"):
        list(data.load("ownnets:beyond", batch_size=2, validation=0).train.epoch(0))


@pytest.mark.parametrize(
    ("there", "answer"),
    [
        (["train/a/", "val/a/"], "folder:"),
        (["images/train/", "masks/train/"], "masks:"),
        (["annotations/instances_train.json"], "coco:"),
        (["ImageSets/Main/", "Annotations/"], "voc:"),
        (["train/a/", "test/a/", "annotations/instances_train.json"], "could be folder and coco"),
        (["train/", "val/"], "no known form"),
        ([], "no known form"),
    ],
)
def test_the_form_of_a_folder(tmp_path: Path, there: list[str], answer: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for entry in there:
        (root / entry).parent.mkdir(parents=True, exist_ok=True)
        (root / entry).mkdir() if entry.endswith("/") else (root / entry).write_text("{}")
    if answer.endswith(":"):
        assert data.full_name(str(root)) == f"{answer}{root}"
    else:
        with pytest.raises(ConfigError, match=answer):
            data.full_name(str(root))
