"""The commands, and what they answer to bad input."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from torchvision.transforms.functional import to_pil_image

import localgrad
from localgrad import cli
from localgrad.cli.console import new_console, new_table
from localgrad.config import validate
from localgrad.data import load
from localgrad.errors import LocalgradError
from localgrad.recipes import override, recipes

TINY = ["--epochs", "1", "train.threads=1", "data.limit=100", "train.batch_size=48"]
DIGITS = ["train", "digits", "beside=[]", *TINY]


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Call = Callable[..., Said]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run one command in a folder of its own; the data sets are the real ones only where asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        try:
            cli.main(list(arguments))
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(
            [
                "train",
                "digits",
                "beside=[]",
                "--epochs",
                "2",
                "train.threads=1",
                "data.limit=300",
                "--run-dir",
                str(folder),
            ]
        )
    assert not stop.value.code
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "copy"))


def refused(said: Said, *words: str, code: int = 2) -> None:
    """One paragraph, which says what was given and what is allowed."""
    assert said.code == code, (said.code, said.out[-500:], said.err)
    text = said.err
    at = text.index("error:")
    assert at == 0 or text[at - 1] == "\n", text
    assert "\n\n" not in text[at:].strip() and "Traceback" not in text, text
    paragraph = " ".join(text[at:].split())
    for word in words:
        assert word in paragraph, (word, paragraph)


# What is typed after `localgrad`, and words the answer must hold.
BAD: dict[str, tuple[list[str], list[str]]] = {
    "recipe": (["train", "digit"], ["unknown recipe 'digit'", "'digits'", ".yaml"]),
    "recipe file": (["train", "mine.yaml"], ["no file 'mine.yaml'", "localgrad list recipes"]),
    "nothing": (["train"], ["nothing to train", "localgrad train digits"]),
    "only a setting": (["train", "optim.lr=0.1"], ["nothing to train"]),
    "only a model": (["train", "--model", "resnet8"], ["nothing to train", "--data"]),
    "method": ([*DIGITS, "-m", "dlg"], ["unknown method 'dlg'", "'dgl'"]),
    "empty part": ([*DIGITS, "-m", "dgl+"], ["empty part", "dgl+windows"]),
    "plug-in without base": ([*DIGITS, "-m", "windows"], ["'windows' is a plug-in", "dgl"]),
    "base twice": ([*DIGITS, "-m", "dgl+e2e"], ["'e2e' is a base and must come first"]),
    "plug-in on the wrong base": ([*DIGITS, "-m", "e2e+windows"], ["windows needs a local base"]),
    "no method": ([*DIGITS, "method=[]"], ["name a base"]),
    "option": ([*DIGITS, "method=[{infopro: {imagee: [1, 0]}}]"], ["method.infopro", "'imagee'", "'image'"]),
    "option of none": ([*DIGITS, "method=[{e2e: {x: 1}}]"], ["method.e2e"]),
    "option's type": ([*DIGITS, "method=[dgl, {windows: {width: wide}}]"], ["method.windows", "width", "'wide'"]),
    "two names": ([*DIGITS, "method=[{dgl: {}, e2e: {}}]"], ["must hold one name"]),
    "weights of no loss": ([*DIGITS, "method=[{infopro: {label: [0, 0], image: [0, 0]}}]"], ["has weight 0"]),
    "negative weight": ([*DIGITS, "method=[{infopro: {label: [-1, 0]}}]"], ["weights are at least 0"]),
    "model": ([*DIGITS, "--model", "resnet33"], ["unknown model 'resnet33'", "resnet32"]),
    "library": ([*DIGITS, "--model", "tim:resnet18"], ["unknown model library 'tim'", "timm"]),
    "timm model": ([*DIGITS, "--model", "timm:resnet19"], ["unknown timm model 'resnet19'", "resnet18"]),
    "torchvision model": ([*DIGITS, "--model", "torchvision:resnet19"], ["unknown torchvision model"]),
    "channels": ([*DIGITS, "--model", "torchvision:resnet18"], ["3-channel", "the data has 1", "timm"]),
    "model option": ([*DIGITS, "model.options.colour=3"], ["model 'resnet8' cannot be built", "colour"]),
    "model option of the data": ([*DIGITS, "model.options.num_classes=3"], ["model.options.num_classes"]),
    "data": ([*DIGITS, "--data", "cifar11"], ["unknown data set 'cifar11'", "'cifar10'"]),
    "data root": ([*DIGITS, "--data", "cifar10", "data.root=nowhere"], ["not found", "nowhere", "LOCALGRAD_DATA"]),
    "home of nobody": ([*DIGITS, "--data", "cifar10", "data.root=~nobody-of-all"], ["not found", "~nobody-of-all"]),
    "parts without number": (
        [*DIGITS, "data.limit=60", "-m", "[dgl, {accumulation: {parts: 1000000000}}]"],
        ["BatchNorm needs more than one sample", "choose the batch size and the parts"],
    ),
    "name that is no text": ([*DIGITS, "--run-dir", "run\udcff"], ["'run\\udcff' is no UTF-8", "choose another"]),
    "section": ([*DIGITS, "optimizer.lr=0.1"], ["optimizer", "unknown setting", "'optim'"]),
    "setting": ([*DIGITS, "optim.learning_rate=0.1"], ["optim.learning_rate", "unknown setting"]),
    "misspelt setting": ([*DIGITS, "train.epoch=3"], ["train.epoch", "'epochs'"]),
    "no setting": ([*DIGITS, "fast"], ["'fast' is no setting", "optim.lr=0.05"]),
    "not YAML": ([*DIGITS, "optim.lr={"], ["is not a YAML value"]),
    "section as value": ([*DIGITS, "optim=5"], ["optim", "5"]),
    "type": ([*DIGITS, "train.batch_size=many"], ["train.batch_size", "'many'"]),
    "choice": ([*DIGITS, "optim.schedule=zigzag"], ["optim.schedule", "'cosine', 'paper'", "'zigzag'"]),
    "precision": ([*DIGITS, "train.precision=fp8"], ["train.precision", "'fp32'"]),
    "lr": ([*DIGITS, "optim.lr=-0.1"], ["optim.lr=-0.1", "positive"]),
    "lr infinite": ([*DIGITS, "optim.lr=.inf"], ["optim.lr=inf"]),
    "epochs": ([*DIGITS, "--epochs", "0"], ["train.epochs=0", "at least 1"]),
    "batch size": ([*DIGITS, "train.batch_size=0"], ["train.batch_size=0"]),
    "batch of one": ([*DIGITS, "train.batch_size=1"], ["BatchNorm needs more than one sample"]),
    "momentum": ([*DIGITS, "optim.momentum=1"], ["optim.momentum=1.0", "below 1"]),
    "weight decay": ([*DIGITS, "optim.weight_decay=.inf"], ["optim.weight_decay=inf"]),
    "label smoothing": ([*DIGITS, "task.label_smoothing=1"], ["label_smoothing=1", "below 1"]),
    "task": ([*DIGITS, "task.name=multilabel"], ["task.name=multilabel", "is for classification"]),
    "task option": ([*DIGITS, "task={name: regression, los: l1}"], ["task.los", "'loss'"]),
    "average": ([*DIGITS, "train.ema_decay=1"], ["train.ema_decay=1.0", "between 0 and 1"]),
    "threads": ([*DIGITS, "train.threads=0"], ["train.threads=0"]),
    "validation": ([*DIGITS, "data.validation=1.0"], ["validation=1.0", "[0, 1)"]),
    "limit": ([*DIGITS, "data.limit=0"], ["limit=0"]),
    "empty split": ([*DIGITS, "data.limit=2"], ["empty split"]),
    "image size": ([*DIGITS, "data.image_size=2"], ["image_size=2", "from 4 to 1024"]),
    "too many blocks": ([*DIGITS, "-k", "40"], ["40 blocks, but this CifarResNet has 4 cut points"]),
    "no blocks": ([*DIGITS, "blocks.num_blocks=0"], ["0 blocks, but", "use 1 to 5 blocks"]),
    "blocks and cuts": ([*DIGITS, "blocks.cuts=[layer2]"], ["blocks.num_blocks=4", "exactly one"]),
    "neither": ([*DIGITS, "blocks.num_blocks=null"], ["exactly one", "--num-blocks 4"]),
    "cut": ([*DIGITS, "blocks={num_blocks: null, cuts: [layer9]}"], ["layer9"]),
    "cut in a branch": (
        [*DIGITS, "blocks={num_blocks: null, cuts: [layer2.0.shortcut]}"],
        ["'layer2.0.shortcut' is no cut point", "branch"],
    ),
    "device": ([*DIGITS, "train.device=gpu"], ["train.device='gpu'", "auto, cpu, cuda"]),
    "device kind": ([*DIGITS, "train.device=meta"], ["train.device='meta'", "cpu and cuda"]),
    "clip per block": ([*DIGITS, "-m", "dgl+windows", "optim.per_block=true", "optim.clip_grad=1"], ["drop one"]),
    "loss": ([*DIGITS, "optim.lr=1e30", "--epochs", "3"], ["the loss of", "optim.lr", "last checkpoint"]),
    "list of data with library": (["list", "data", "timm"], ["'timm' goes with", "list models"]),
    "library to list": (["list", "models", "keras"], ["unknown model library 'keras'"]),
    "summary of nothing": (["summary"], ["nothing to summarise", "--model resnet32"]),
    "summary's size": (["summary", "--model", "resnet8", "-k", "2", "--image-size", "0"], ["--image-size 0"]),
    "resume nothing": (["train", "--resume", "nowhere"], ["nowhere holds no run", "config.yaml"]),
    "resume with a recipe": (["train", "digits", "--resume", "x"], ["--resume", "leave digits out"]),
    "resume with a setting": (["train", "--resume", "x", "optim.lr=1"], ["leave optim.lr=1 out"]),
    "resume with flags": (["train", "--resume", "x", "--epochs", "1", "-m", "dgl"], ["leave --method, --epochs out"]),
    "eval of nothing": (["eval", "nowhere"], ["nowhere holds no run"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_paragraph(case: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what Python sees is a typed error."""
    raised: list[BaseException | None] = []
    fail = cli._fail

    def noted(message: str, code: int) -> None:
        raised.append(sys.exc_info()[1])
        fail(message, code)

    monkeypatch.setattr(cli, "_fail", noted)
    arguments, words = BAD[case]
    refused(call(*arguments), *words)
    assert isinstance(raised[0], LocalgradError)


def test_class_indices_are_learnt_as_numbers(call: Call) -> None:
    said = call("train", "digits", "beside=[]", "--epochs", "4", "optim.lr=0.02", "task.name=regression",
                "train.threads=1", "--run-dir", "run", "--json")  # fmt: skip
    (result,) = json.loads(said.out)
    assert list(result["last"]["metrics"]) == ["r2", "mae", "rmse"]
    assert result["last"]["metrics"]["r2"] == result["last"]["score"]["model"] > 0.5  # 0 for any constant
    assert json.loads(call("eval", "run", "--json").out)["score"] == result["last"]["score"]
    loaded = load("digits", batch_size=64)
    pixels, _ = next(loaded.test.epoch(0))
    from PIL import Image

    grey = (pixels[0, 0] * loaded.std[0] + loaded.mean[0]).clamp(0, 1) * 255
    Image.fromarray(grey.byte().numpy()).save("one.png")
    (row,) = json.loads(call("predict", "run", "one.png", "--json").out)
    assert -5 < float(row["answer"]) < 15


def test_a_plan_of_another_task(call: Call) -> None:
    said = call("plan", "resnet8", "--batch-size", "4", "--task", "multilabel:5", "--memory",
                "1GiB", "--rates", "1,10", "--method", "[{dgl: {head: linear}}]", "--json")  # fmt: skip
    found = json.loads(said.out)
    assert found["task"] == "localgrad.tasks.multilabel(5)" and "task = localgrad.tasks.multilabel(5)" in found["code"]
    for wrong in ("detection", "multilabel:", "multilabel:x", ":5"):
        refused(call("plan", "resnet8", "--batch-size", "4", "--task", wrong), "write one of classification")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_a_device_that_is_not_there(call: Call) -> None:
    refused(call(*DIGITS, "train.device=cuda"), "train.device='cuda'", "0 CUDA devices", "use cpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {epochs: 3", ["not valid YAML"]),
        ("- dgl\n- e2e\n", ["expected a mapping", "found list"]),
        ("3: 4\n", ["expected a mapping"]),
        ("extends: nothing\n", ["unknown recipe 'nothing'"]),
        ("extends: other.yaml\n", ["no file", "other.yaml"]),
        ("extends: mine.yaml\n", ["circle", "mine.yaml -> mine.yaml"]),
        ("train: {epochs: 3}\n", ["exactly one"]),
        ("method: 5\n", ["method", "5"]),
        ("method: [dgl]\nmodel: resnet8\n", ["model", "'resnet8'"]),
        ("beside: [dgl]\n", ["beside"]),
        (b"\xff\xfe\x00", ["not valid YAML"]),
    ],
)
def test_bad_recipes_are_refused(text: str | bytes, words: list[str], call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(call("train", "mine.yaml", "--data", "digits"), *words)


def test_damaged_data_are_refused(call: Call, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "folder").mkdir(parents=True)
    for split in ("train", "test"):
        np.savez(
            root / f"cifar10_{split}_jpeg.npz", jpeg=np.zeros(9, np.uint8), offsets=np.arange(3), labels=np.zeros(2)
        )
    whole = root / "cifar10_train_jpeg.npz"
    whole.write_bytes(whole.read_bytes()[:200])
    refused(call("train", "cifar10_resnet32", f"data.root={root!s}"), "cifar10_train_jpeg.npz is damaged")
    refused(call(*DIGITS, "--data", f"folder:{root / 'folder'}"), "not found", "no train")
    (root / "folder" / "train").mkdir()
    refused(call(*DIGITS, "--data", f"folder:{root / 'folder'}"), "val/<class>/* or test")


def test_run_directories_that_cannot_be_used(call: Call, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(call(*DIGITS, "--run-dir", "file"), "cannot use file", "--run-dir")
    refused(call(*DIGITS, "--run-dir", "file/below"), "cannot use file/below")
    refused(call("train", "digits", *TINY, "--run-dir", "file/below"), "cannot use file/below")
    for arguments in (DIGITS, ["train", "digits", *TINY]):
        refused(call(*arguments, "--run-dir", str(copy)), "already holds a run", "--resume", "--overwrite")
    before = (copy / "model.safetensors").read_bytes()
    assert call(*DIGITS, "--run-dir", str(copy), "--overwrite").code == 0
    assert (copy / "model.safetensors").read_bytes() != before


def test_damaged_runs_are_refused_or_go_on_from_what_is_whole(call: Call, copy: Path) -> None:
    config, result, weights = (copy / name for name in ("config.yaml", "result.json", "model.safetensors"))
    text, told, data = config.read_text(), result.read_text(), weights.read_bytes()
    places = sorted((copy / "checkpoints").iterdir())
    for damaged in ("a: [", "5", text.replace("lr: 0.1", "lr: 0.2"), None):
        config.unlink()
        if damaged is not None:
            config.write_text(damaged)
        with pytest.warns(UserWarning, match=f"taking the settings that {places[-1].name} was written with"):
            assert call("train", "--resume", str(copy)).code == 0
        assert (config.read_text(), result.read_text(), weights.read_bytes()) == (text, told, data)
    picture = copy / "picture.png"
    to_pil_image(torch.zeros(1, 8, 8)).save(picture)
    for file, damaged in ((weights, data[:-9]), (result, told.replace("dgl", "dgi"))):
        content = file.read_bytes()
        file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        refused(call("predict", str(copy), str(picture)), file.name)
        file.write_bytes(content)
    for place in places:
        (place / "complete.json").write_text("{}")
    refused(call("train", "--resume", str(copy)), "no checkpoint in", "is whole", "complete.json is damaged")


def test_a_full_disk_is_reported_and_loses_nothing(call: Call, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_room(*_: Any) -> None:
        raise full

    before = {path: path.read_bytes() for path in copy.rglob("*.safetensors")}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_room)
        refused(call(*DIGITS, "--run-dir", "new"), "cannot write", "No space left")
        refused(call("train", "--resume", str(copy)), "cannot write", "No space left")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", no_room)
        refused(call(*DIGITS, "--run-dir", "newer"), "could not save the checkpoint", "No space left")
    assert before == {path: path.read_bytes() for path in copy.rglob("*.safetensors")}
    from localgrad.measure import plots

    with monkeypatch.context() as patch:
        patch.setattr(plots, "save_figure", no_room)
        refused(call("train", "--resume", str(copy)), "No space left")
        patch.setattr(
            plots, "save_figure", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied", "x.png"))
        )
        refused(call("train", "--resume", str(copy)), "x.png: Permission denied")
    assert not list(copy.glob("*.partial"))


def test_ctrl_c_outside_of_training_is_no_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("localgrad.cli.listing._data", interrupt)
    refused(call("list", "data"), "stopped", code=130)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "digits", "--fast"], ["train", "digits", "--epochs", "many"], ["train", "digits", "--epochs"],
        ["trian"],
        ["list", "colours"], ["list"], ["eval"], ["eval", "x", "--split", "train"], ["summary", "--image-size", "big"],
        ["doctor", "now"],
    ],
)  # fmt: skip
def test_usage_errors(arguments: list[str], call: Call) -> None:
    said = call(*arguments)
    assert said.code == 2 and "Error" in said.err and "Traceback" not in said.err
    assert any(word in said.err for word in (*arguments[-2:], "Missing argument"))


def test_a_run_leaves_everything_in_one_directory(trained: Path, call: Call) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "config.yaml", "run.json", "metrics.csv", "curves.png", "checkpoints", "model.safetensors", "result.json",
        "results.json",
    }  # fmt: skip
    assert not list(trained.glob("*.partial"))
    rows = list(csv.DictReader((trained / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row["validation/score/model"]) <= 1 and float(row["train/loss/block 1"]) > 0 for row in rows)
    assert (trained / "curves.png").read_bytes()[:4] == b"\x89PNG"
    settings = validate(override({}, [f"{k}={json.dumps(v)}" for k, v in read_yaml(trained).items()]), "x")
    assert settings.train.epochs == 2 and settings.data.limit == 300 and settings.beside == []


def read_yaml(folder: Path) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load((folder / "config.yaml").read_text()))


def test_exported_weights_are_the_bare_models(trained: Path) -> None:
    model = localgrad.models.create("resnet8", num_classes=10, in_channels=1)
    model.load_state_dict(load_file(trained / "model.safetensors"), strict=True)
    test = load("digits", batch_size=64).test
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in test.epoch(0))
    result = json.loads((trained / "result.json").read_text())
    assert right / test.num_samples == pytest.approx(result["last"]["score"]["model"], abs=1e-7)


def test_eval_gives_the_figures_of_the_run(trained: Path, call: Call) -> None:
    result = json.loads((trained / "result.json").read_text())
    said = call("eval", str(trained), "--json")
    assert said.code == 0
    scores = json.loads(said.out)
    assert scores["score"] == result["last"]["score"] and (scores["epoch"], scores["split"]) == (2, "test")
    best = json.loads(call("eval", str(trained), "--json", "--best").out)
    assert best["score"] == result["best"]["score"] and best["epoch"] == result["best"]["epoch"]
    best = json.loads(call("eval", str(trained), "--json", "--best", "--split", "validation").out)
    assert best["score"]["model"] == pytest.approx(result["best"]["validation"])
    said = call("eval", str(trained))
    assert f"{scores['score']['model']:.2%}" in said.out and max(map(len, said.out.splitlines())) <= 80


def test_eval_needs_the_split_it_is_asked_for(call: Call) -> None:
    assert call(*DIGITS, "data.validation=0", "--run-dir", "run").code == 0
    refused(call("eval", "run", "--split", "validation"), "data.validation=0", "--split test")
    refused(call("eval", "run", "--best"), "no best epoch")


def test_several_methods_side_by_side(call: Call) -> None:
    said = call("train", "digits", *TINY, "--json", "--run-dir", "runs/all")
    assert said.code == 0, said.err
    results = json.loads(said.out)
    assert results == json.loads(Path("runs/all/results.json").read_text())
    assert [r["method"] for r in results] == ["dgl", "e2e", "e2e+checkpointing"]
    assert results[1]["last"] == results[2]["last"]  # checkpointing changes no result
    assert results[0]["cost"]["flops"] < results[1]["cost"]["flops"] < results[2]["cost"]["flops"]
    assert Path("runs/all/comparison.png").is_file() and Path("runs/all/e2e-checkpointing/curves.png").is_file()
    refused(call("eval", "runs/all"), "several runs", "runs/all/dgl, runs/all/e2e, runs/all/e2e-checkpointing")
    said = call("train", "--resume", "runs/all")  # finished: reports once more
    assert said.code == 0 and "e2e+checkpointing" in said.out and "activa" in said.out
    assert max(map(len, said.out.splitlines())) <= 80 and "…" not in said.out


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch._dynamo's
@pytest.mark.filterwarnings("ignore:a step is captured as a CUDA graph:UserWarning")
def test_the_summary_says_what_the_compiler_and_graphs_gave(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compiled: list[localgrad.LocalNetwork] = []

    def compile_blocks(network: localgrad.LocalNetwork, original: Any = localgrad.LocalNetwork.compile_blocks) -> None:
        compiled.append(network)
        original(network, backend="eager")

    monkeypatch.setattr(localgrad.LocalNetwork, "compile_blocks", compile_blocks)
    said = call(*DIGITS, "--num-blocks", "2", "train.compile=true", "train.capture=true", "train.device=cpu")
    assert said.code == 0, said.err
    assert len(compiled) == 2  # that of the run, and the copy that is timed beside a plain one
    assert re.search(r"dgl: compiled, a step takes [\d.]+ ms instead of [\d.]+ ms \(\d+\.\d\dx\)", said.out)
    assert re.search(r"dgl: 0 CUDA graphs, 0 of \d+ steps replayed", said.out)
    torch._dynamo.reset()


def test_a_run_without_a_recipe_has_its_own_name(call: Call) -> None:
    said = call(
        "train",
        "data.limit=100",
        "--model",
        "resnet8",
        "--data",
        "digits",
        "-k",
        "2",
        "--epochs",
        "1",
        "train.threads=1",
    )
    assert said.code == 0, said.err
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("digits-dgl-") and str(folder) in said.out


@pytest.mark.parametrize("what", ["models", "methods", "data", "recipes"])
def test_lists(what: str, call: Call) -> None:
    rows = json.loads(call("list", what, "--json").out)
    names = [row["name"] for row in rows]
    expected = {
        "models": localgrad.models.available(), "methods": localgrad.methods.__all__, "recipes": recipes(),
        "data": ["digits", "cifar10"],
    }[what]  # fmt: skip
    assert set(names) >= set(expected)
    said = call("list", what)
    assert all(name in said.out for name in names) and max(map(len, said.out.splitlines())) <= 80


def test_list_of_a_library(call: Call) -> None:
    names = [row["name"] for row in json.loads(call("list", "models", "torchvision", "--json").out)]
    assert "torchvision:resnet50" in names


def test_doctor(call: Call) -> None:
    said = call("doctor").out
    rows = {line.strip().partition("  ")[0]: line for line in said.splitlines() if "  " in line.strip()}
    assert torch.__version__.split("+")[0] in rows["torch"] and "torchvision ops" in said
    assert " found " in rows["data digits"] and "not found" not in rows["data digits"]


def pictures(root: Path) -> Path:
    for name in ("train/a/1", "train/a/2", "train/b/1", "train/b/2", "train/b/3", "val/a/1", "val/b/1"):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8)).save(path)
    return root


def test_doctor_reads_data(call: Call, tmp_path: Path) -> None:
    digits = call("doctor", "--data", "digits").out
    assert "1437 images to train on" in digits and "all images are one tensor on" in digits
    said = " ".join(call("doctor", "--data", str(pictures(tmp_path / "pictures"))).out.split())
    rows = re.findall(r"^(?:.* )?0 \d+\.\d\d (\d+\.\d\d) (\d+\.\d\d) (\d+) ", said)
    assert len(rows) == 1 and "5 images to train on" in said
    assert "0 workers: pictures are decoded once and kept in memory: 5 in 0.00 GiB so far" in said
    refused(call("doctor", "--data", "digit"), "unknown data set 'digit'", "'digits'")


def test_a_run_says_where_its_pictures_come_from(call: Call, tmp_path: Path) -> None:
    said = call(
        "train", "--model", "resnet8", "--method", "dgl", "--num-blocks", "2", "--epochs", "1", "--data",
        str(pictures(tmp_path / "pictures")), "data.image_size=16", "data.validation=0.4", "train.batch_size=3",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "pictures are decoded once and kept in memory: 0 in 0.00 GiB so far, of at most" in said.out + said.err


def test_summary_command(call: Call) -> None:
    found = json.loads(call("summary", "digits", "--json").out)
    assert sum(row["parameters"] for row in found["blocks"]) == found["total"]["parameters"]
    assert found["image_shape"] == [1, 8, 8]
    said = call("summary", "digits")
    assert "layer1.0" in said.out or "layer1" in said.out
    assert max(map(len, said.out.splitlines())) <= 80 and "…" not in said.out


def test_bench(call: Call, tmp_path: Path) -> None:
    tiny = ["bench", "resnet8", "--batch-size", "4", "--image-size", "8", "--rounds", "1"]
    out = tmp_path / "new" / "folder"
    options = ["-m", "dgl", "-m", "[{dgl: {head: linear}}]", "-k", "2", "--no-combinations", "--out", str(out)]
    said = call(*tiny, *options)
    names = [row["name"] for row in json.loads((out / "bench.json").read_text())["rows"]]
    assert names[-2:] == ["dgl K=2", "dgl(head=linear) K=2"] and names[0] == "end-to-end"
    assert all(name in said.out for name in names)
    assert all((out / picture).stat().st_size > 10_000 for picture in ("pareto.png", "timeline.png"))
    refused(call(*tiny, "--out", str(out / "bench.json")), "name a folder that can be written")
    refused(call(*tiny, "--variant", "fp16"), "unknown precision 'fp16'")


def test_compare(call: Call, tmp_path: Path) -> None:
    tiny = ["compare", "digits", "-k", "2", "train.epochs=1", "data.limit=100"]
    said = call(*tiny, "-m", "dgl", "--seed", "3", "--out", str(tmp_path))
    assert "| dgl, K=2 " in said.out and "as end-to-end, bit for bit" in said.out
    assert {"rows.jsonl", "costs.json", "table.md", "picture.png"} <= {path.name for path in tmp_path.iterdir()}
    assert call("compare", "--out", str(tmp_path)).out == said.out
    refused(call("compare"), "nothing to compare: name a recipe")
    refused(call(*tiny, "-m", "dlg", "--out", str(tmp_path)), "unknown method 'dlg'; did you mean 'dgl'?")


def commands() -> dict[str, Any]:
    return {"": typer.main.get_command(cli.app), **typer.main.get_command(cli.app).commands}


@pytest.mark.parametrize("name", commands())
def test_help_shows_every_word_of_every_text(name: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets are how methods and optional parts are written, and markup to the printer."""
    monkeypatch.setenv("COLUMNS", "400")
    said = call(*([name] if name else []), "--help")
    assert said.code == 0 and "Usage:" in said.out
    shown = re.sub(r"[\s│]+", " ", said.out)
    command = commands()[name]
    texts = [parameter.help for parameter in command.params if getattr(parameter, "help", None)]
    for line in (*texts, *re.sub(r"\[/?bold\]", "", command.help or "").replace("\\[", "[").splitlines()):
        assert " ".join(line.split()) in shown, line


def test_train_has_few_options() -> None:
    assert len(commands()["train"].params) <= 14


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom localgrad import cli\ntry:\n    cli.main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(', '.join({'torch', 'numpy', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--resume" in done.stdout, done.stderr


def test_extras_in_hints_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("what", "remark", left=2)
    table.add_row("timm", "pip install localgrad[timm]")
    new_console().print(table)
    assert "localgrad[timm]" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_a_wrong_usage_is_said_by_the_first_rank_alone(rank: str, shown: bool) -> None:
    """The command line is the same for all of them; each ends with code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "localgrad", "train", "digits", "--no-such-option"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "RANK": rank},
    )  # fmt: skip
    assert done.returncode == 2 and ("No such option" in done.stderr) == shown
