"""Training: resuming, precision, averaging, selection, guards."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from localgrad.config import validate
from localgrad.errors import CheckpointError, ConfigError, TrainingError
from localgrad.recipes import merge
from localgrad.train.experiment import Experiment, build
from localgrad.train.folder import RunFolder
from localgrad.train.loop import train
from localgrad.train.meters import evaluate
from localgrad.train.run import compare, run

SMALL: dict[str, Any] = {
    "method": ["dgl"],
    "model": {"name": "resnet8"},
    "data": {"name": "digits", "limit": 260},
    "blocks": {"num_blocks": 4},
    "optim": {"lr": 0.05, "clip_grad": 5.0},
    "train": {"epochs": 2, "batch_size": 48, "threads": 1},
}


def settings(**changes: Any) -> Any:
    return validate(merge(SMALL, changes), "test")


class Stop(Exception):
    """Stands for a crash."""


def stop_after(step: int) -> Any:
    def after_step(state: Experiment) -> None:
        if state.step == step:
            raise Stop

    return after_step


def nothing(_: Experiment) -> None:
    pass


def finish(experiment: Experiment) -> Experiment:
    train(experiment, nothing, nothing)
    return experiment


def through_file(experiment: Experiment, path: Path) -> Experiment:
    """A new experiment restored from a checkpoint of this one."""
    folder = RunFolder(path)
    folder.claim()
    folder.open(experiment)
    folder.save(experiment)
    folder.close()
    torch.randn(7)  # what the process did before must not matter
    fresh = build(experiment.config)
    assert RunFolder(path).restore(fresh)
    return fresh


def whole_state(experiment: Experiment) -> dict[str, Any]:
    """Everything that decides how it goes on."""
    states = [optimizer.state_dict()["state"].items() for optimizer in experiment.stepper.optimizers]
    optimizers = [{index: dict(sorted(slots.items())) for index, slots in state} for state in states]
    return {"network": dict(experiment.network.state_dict()), "optimizers": optimizers, **experiment.state()}


def assert_equal(a: Any, b: Any, place: str = "state") -> None:
    """Bit for bit, but for seconds."""
    assert type(a) is type(b), place
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            if key not in ("seconds", "random"):
                assert_equal(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{place}[{index}]")
    else:
        assert a == b, (place, a, b)


class Numbered(torch.optim.SGD):
    """Keeps numbers in its state beside tensors, and steps by them."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"], state["share"] = state.get("step", 0) + 1, state.get("share", 1.0) / 1.1
                parameter.grad *= state["share"] / state["step"]
        return super().step(closure)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows, dropout": {
        "method": ["dgl", "windows"],
        "model": {"name": "torchvision:mobilenet_v3_small"},
        "data": {"name": "folder"},
    },
    "per block": {"optim": {"per_block": True}, "train": {"ema_decay": 0.9}},
    "in backward": {"method": ["e2e"], "optim": {"in_backward": True, "clip_grad": None}},
    "numbers in the state": {"optim": {"name": "unit.test_train:Numbered", "options": {"momentum": 0.5}}},
    "8-bit state": {"optim": {"name": "bitsandbytes.optim:AdamW8bit", "lr": 0.002}},
    "adamw, warm-up": {"optim": {"name": "adamw", "lr": 0.002, "warmup_epochs": 1}},
    "average": {"train": {"ema_decay": 0.8}, "task": {"label_smoothing": 0.1}},
    "bf16": {"train": {"precision": "bf16"}, "data": {"limit": 120}},
    "fp16": {"train": {"precision": "fp16"}, "optim": {"per_block": True}, "data": {"limit": 120}},
    "accumulation": {"method": ["e2e", "checkpointing", {"accumulation": {"parts": 3}}]},
    "channels last": {"train": {"channels_last": True}},
    "infopro": {"method": [{"infopro": {"loss": "contrast"}}], "data": {"limit": 150}},
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of small image files."""
    from PIL import Image

    for split, count in (("train", 12), ("val", 3)):
        for index, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 40), (90 * index + 7 * number, 60, 30)).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_in_mid_epoch_changes_no_bit(variant: str, tmp_path: Path, images: Path) -> None:
    changes = VARIANTS[variant]
    if variant == "8-bit state":
        pytest.importorskip("bitsandbytes")
    if changes.get("data", {}).get("name") == "folder":
        changes = {
            **changes,
            "data": {"name": f"folder:{images}", "image_size": 32, "validation": 0.25},
            "train": {"batch_size": 6},
        }
    config = settings(**changes)
    if "dropout" in variant:
        assert any(isinstance(m, torch.nn.Dropout) for m in build(config).network.modules())
    steps = len(build(config).data.train) * config.train.epochs
    whole = finish(build(config))
    assert whole.step == steps
    # A step inside the second epoch but not its last; the test after this one stops at the very end of an epoch.
    stop = int(torch.randint(steps // 2 + 1, steps, (), generator=torch.Generator().manual_seed(len(variant))))
    stopped = build(config)
    with pytest.raises(Stop):
        train(stopped, stop_after(stop), nothing)
    resumed = finish(through_file(stopped, tmp_path / "checkpoint"))
    assert_equal(whole_state(whole), whole_state(resumed))


def test_one_block_on_the_device_at_a_time_changes_no_bit(tmp_path: Path) -> None:
    """Weights, state of the optimizers, averages, scores; and a run goes on with it that was begun without."""
    changes = {"method": ["dgl", "man"], "optim": {"name": "adamw", "lr": 0.002, "per_block": True}}
    plain = finish(build(settings(**changes, train={"ema_decay": 0.9})))
    config = settings(**changes, train={"ema_decay": 0.9, "resident": True})
    assert_equal(whole_state(finish(build(config))) | {"config": ""}, whole_state(plain) | {"config": ""})
    stopped = build(plain.config)
    with pytest.raises(Stop):
        train(stopped, stop_after(7), nothing)
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.open(stopped)
    folder.save(stopped)
    folder.close()
    resumed = build(config)
    assert RunFolder(tmp_path / "run").restore(resumed)
    finish(resumed)
    assert "each block is on cpu only while it runs" in resumed.steps_as
    assert_equal(whole_state(resumed) | {"config": ""}, whole_state(plain) | {"config": ""})
    scored = [evaluate(one.evaluated, one.data.test) for one in (resumed, plain)]
    assert scored[0] == scored[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "per_block=false"),
        ({"optim": {"per_block": True}, "train": {"compile": True}}, r"train\.compile=true"),
        ({"optim": {"per_block": True}, "train": {"capture": True}}, r"train\.capture=true"),
    ],
)
def test_what_keeps_more_than_one_block_there_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(settings(**merge(changes, {"train": {"resident": True}})))


def test_resuming_twice_and_after_the_last_batch_of_an_epoch(tmp_path: Path) -> None:
    config = settings()
    whole = finish(build(config))
    steps = len(whole.data.train)
    for first, second in ((steps, steps + 1), (2, steps), (1, 2 * steps)):
        state = build(config)
        for stop in (first, second):
            with pytest.raises(Stop):
                train(state, stop_after(stop), nothing)
            state = through_file(state, tmp_path / f"{first} {stop}")
        assert_equal(whole_state(whole), whole_state(finish(state)))


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    state = build(settings())
    through_file(state, tmp_path)
    for changes, name in (
        ({"optim": {"lr": 0.06}}, "optim.lr: 0.05 there, 0.06 here"),
        ({"method": ["e2e"]}, "method"),
        ({"train": {"seed": 1}}, "train.seed"),
        ({"data": {"limit": 250}}, "data.limit"),
    ):
        with pytest.raises(CheckpointError, match=name):
            RunFolder(tmp_path).restore(build(settings(**changes)))
    RunFolder(tmp_path).restore(build(settings(train={"checkpoint_every": 5, "device": "cpu"})))


def quiet() -> Console:
    import io

    return Console(file=io.StringIO())


def start(config: Any, folder: Path, *, resume: bool = False) -> tuple[list[dict[str, Any]], str]:
    console = quiet()
    results = compare(config, folder, console, resume=resume, overwrite=False, resume_with="again")
    return results, console.file.getvalue()


def test_a_finished_run_reports_again_and_a_torn_checkpoint_falls_back(tmp_path: Path) -> None:
    config = settings()
    first, _ = start(config, tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    again, said = start(config, tmp_path, resume=True)
    for a, b in zip(first, again, strict=True):
        assert {k: v for k, v in a.items() if k != "cost"} == {k: v for k, v in b.items() if k != "cost"}
    assert "epoch" not in said
    newest = max((tmp_path / "checkpoints").iterdir())
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged: {shard.name}; continuing from step"):
        third, said = start(config, tmp_path, resume=True)
    assert "dgl 2/2" in said
    assert (tmp_path / "model.safetensors").read_bytes() == weights and third[0]["last"] == first[0]["last"]


def test_no_good_checkpoint_is_refused_and_none_at_all_begins_anew(tmp_path: Path) -> None:
    config = settings(train={"epochs": 1})
    start(config, tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for path in tmp_path.glob("checkpoints/*/complete.json"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        start(config, tmp_path, resume=True)
    shutil.rmtree(tmp_path / "checkpoints")
    _, said = start(config, tmp_path, resume=True)
    assert "starting from the beginning" in said
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_same_seed_same_weights_and_another_seed_others() -> None:
    one, two, other = (finish(build(settings(train={"epochs": 1, "seed": seed}))) for seed in (3, 3, 4))
    assert_equal(whole_state(one), whole_state(two))
    assert not torch.equal(one.network.model.fc.weight, other.network.model.fc.weight)


def test_deterministic_mode_is_switched_on_and_off_and_changes_no_cpu_result() -> None:
    one = finish(build(settings(train={"epochs": 1, "deterministic": True})))
    assert torch.are_deterministic_algorithms_enabled()
    two = finish(build(settings(train={"epochs": 1})))
    assert not torch.are_deterministic_algorithms_enabled()
    assert_equal(one.network.state_dict(), two.network.state_dict())


def test_average_of_weights_equals_its_closed_form() -> None:
    decay = 0.7
    seen: list[dict[str, Tensor]] = []
    state = build(settings(train={"epochs": 1, "ema_decay": decay}))
    train(state, lambda s: seen.append({k: v.clone() for k, v in s.network.state_dict().items()}), nothing)
    assert state.evaluated is not state.network
    for name, value in state.evaluated.state_dict().items():
        if value.is_floating_point():
            steps = [s[name].double() for s in seen]
            expected = steps[0] * decay ** (len(steps) - 1)
            expected += sum((1 - decay) * decay ** (len(steps) - 1 - t) * w for t, w in enumerate(steps) if t > 0)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_scored_and_exported(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = settings(train={"epochs": 1, "ema_decay": 0.5})
    state, _ = run(config, RunFolder(tmp_path), quiet(), "dgl", "again")
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights["fc.weight"], state.evaluated.model.fc.weight)
    assert not torch.equal(weights["fc.weight"], state.network.model.fc.weight)


def test_accumulated_parts_score_and_weigh_every_image_once() -> None:
    state = build(settings(train={"epochs": 1}, method=["dgl", {"accumulation": {"parts": 3}}], data={"validation": 0}))
    train(state, nothing, nothing)
    row = state.history[0]["train"]
    assert set(row["score"]) == {"block 1", "block 2", "block 3", "model"}
    assert all(0 <= score <= 1 for score in row["score"].values())
    images = state.data.train.num_samples
    assert all(abs(score * images - round(score * images)) < 1e-3 for score in row["score"].values())
    assert all(1 < loss < 6 for loss in row["loss"].values())


@pytest.mark.parametrize("changes", [{"channels_last": True}, {"precision": "bf16"}])
def test_layout_and_precision_train_nearly_the_same(changes: dict[str, Any]) -> None:
    plain = finish(build(settings(train={"epochs": 1})))
    other = finish(build(settings(train={"epochs": 1, **changes})))
    a, b = (s.history[0]["train"]["loss"]["model"] for s in (plain, other))
    assert a == pytest.approx(b, rel=0.03)
    if "channels_last" in changes:
        weight = other.network.model.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch._dynamo's own
def test_compiled_blocks_train_like_eager_ones() -> None:
    torch._dynamo.reset()
    config = settings(blocks={"num_blocks": 2}, train={"epochs": 1}, data={"limit": 100})
    eager, compiled = finish(build(config)), build(config)
    compiled.network.compile_blocks(backend="eager")
    finish(compiled)
    assert list(compiled.network.state_dict()) == list(eager.network.state_dict())
    for a, b in zip(eager.network.parameters(), compiled.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_evaluation_changes_nothing() -> None:
    state = build(settings())
    state.network.model.layer2.eval()  # frozen on purpose
    before = {k: v.clone() for k, v in state.network.state_dict().items()}
    modes = {name: module.training for name, module in state.network.named_modules()}
    scores = evaluate(state.network, state.data.test)
    assert_equal(before, dict(state.network.state_dict()))
    assert modes == {name: module.training for name, module in state.network.named_modules()}
    assert all(p.grad is None for p in state.network.parameters())
    model = state.network.model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in state.data.test.epoch(0))
    assert scores["score"]["model"] == pytest.approx(right / state.data.test.num_samples)


def test_the_best_epoch_is_chosen_on_validation(tmp_path: Path) -> None:
    config = settings(train={"epochs": 5}, optim={"lr": 0.3, "schedule": "constant"}, data={"limit": 400})
    touched: list[str] = []
    state = build(config)
    folder = RunFolder(tmp_path)
    folder.open(state)
    test_epoch = type(state.data.test).epoch

    def epoch(loader: Any, *args: Any, **kwargs: Any) -> Any:
        touched.append("test" if loader is state.data.test else "other")
        return test_epoch(loader, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(state.data.test), "epoch", epoch)
        train(state, nothing, folder.finish_epoch)
    folder.close()
    assert "test" not in touched
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    scores = [float(row["validation/score/model"]) for row in rows]
    best = scores.index(max(scores)) + 1
    assert state.best == {"epoch": best, "step": best * len(state.data.train), "score": max(scores)}
    network = build(config).network
    network.load_state_dict(folder.best_weights(state))
    assert state.data.validation is not None
    assert evaluate(network, state.data.validation)["score"]["model"] == pytest.approx(max(scores))


def test_the_best_epoch_is_kept_as_long_as_a_checkpoint_needs_it(tmp_path: Path) -> None:
    """Also by the checkpoint before the newest, which takes over if that one is damaged."""
    state, folder = build(settings()), RunFolder(tmp_path)
    folder.open(state)
    kept = []
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4)):
        state.step, state.best = step, {"epoch": best, "step": best, "score": 0.5}
        folder.save(state)
        kept.append([int(path.name.removeprefix("step")) for path in sorted((tmp_path / "checkpoints").iterdir())])
    folder.close()
    assert kept == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [4, 5, 6]]
    (shard,) = (tmp_path / "checkpoints" / "step00000004").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"best epoch, 4, are lost.*{shard.name}"):
        folder.best_weights(state)


def test_a_loss_that_is_not_finite_stops_and_spoils_no_checkpoint(tmp_path: Path) -> None:
    state = build(settings())
    folder = RunFolder(tmp_path)
    folder.open(state)
    with pytest.raises(Stop):
        train(state, stop_after(2), nothing)
    folder.save(state)
    state.network.model.fc.weight.data.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"loss of model is nan at step 3.*optim\.lr"):
        train(state, folder.save, nothing)
    with pytest.raises(TrainingError):  # also where losses are read only once an epoch
        folder.save(state)
    folder.close()
    good = build(settings())
    assert RunFolder(tmp_path).restore(good) and good.step == 2
    assert all(torch.isfinite(v).all() for v in good.network.state_dict().values() if v.is_floating_point())


def test_memory_and_batches_that_are_too_small_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="BatchNorm needs more than one sample"):
        finish(build(settings(train={"batch_size": 1}, data={"limit": 20})))
    state = build(settings())

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    begin = state.network.model.get_submodule(state.network.cuts[0].name)
    monkeypatch.setattr(begin, "forward", exhausted)
    with pytest.raises(TrainingError, match=r"does not fit in the memory of cpu; lower train\.batch_size"):
        finish(state)


def test_model_options_that_the_data_decide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.options\.num_classes"):
        build(settings(model={"options": {"num_classes": 3}}))


def test_the_same_method_twice_gets_two_folders(tmp_path: Path) -> None:
    config = settings(beside=[["e2e"], [{"dgl": {}}]], train={"epochs": 1}, data={"limit": 100})
    results, _ = start(config, tmp_path)
    assert [r["method"] for r in results] == ["dgl", "e2e", "dgl-2"]
    assert results[0]["last"] == results[2]["last"]
    assert all((tmp_path / r["method"] / "result.json").is_file() for r in results)
    assert results[0]["cost"]["auxiliary_parameters"] > 0 == results[1]["cost"]["auxiliary_parameters"]
    assert results[0]["cost"]["activation_bytes"] < results[1]["cost"]["activation_bytes"]
    assert json.loads((tmp_path / "dgl" / "result.json").read_text())["blocks"] == 4
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_local_learning_reaches_a_useful_accuracy_on_digits() -> None:
    config = settings(
        data={"limit": None}, optim={"lr": 0.1, "weight_decay": 5e-4, "clip_grad": None},
        train={"epochs": 8, "batch_size": 64},
    )  # fmt: skip
    state = finish(build(config))
    assert evaluate(state.network, state.data.test)["score"]["model"] >= 0.95


def test_a_directory_has_one_writer_at_a_time(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.claim()
    for resume in (False, True):
        with pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()} on .*, since \d"):
            second.claim(resume=resume)
    first.close()
    second.claim()
    second.close()
    code = (
        "import sys, time; from pathlib import Path; from localgrad.train.folder import RunFolder; "
        "folder = RunFolder(Path(sys.argv[1])); folder.claim(); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"is in use by process {other.pid}"):
            first.claim()
        other.kill()
        other.wait()
    first.claim()  # the lock of a process that has died is free
    first.close()


def test_metrics_that_a_kill_cut_off_are_made_up(tmp_path: Path) -> None:
    config = settings()
    start(config, tmp_path)
    rows = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text("".join(rows.splitlines(keepends=True)[:2]))
    start(config, tmp_path, resume=True)
    assert (tmp_path / "metrics.csv").read_text() == rows


def test_replacing_a_run_clears_all_of_it_and_nothing_else(tmp_path: Path) -> None:
    config = settings(train={"epochs": 1}, data={"limit": 100})
    start(config, tmp_path)
    start(config, tmp_path / "another method")
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match="already holds a run"):
        folder.claim()
    folder.claim(overwrite=True)
    folder.close()
    assert {path.name for path in tmp_path.iterdir()} <= {"notes.txt", ".lock"}


def test_a_damaged_run_stops_none_of_those_resumed_with_it(tmp_path: Path) -> None:
    config = settings(beside=[["e2e"]], train={"epochs": 1}, data={"limit": 100})
    start(config, tmp_path)
    for file in tmp_path.glob("dgl/checkpoints/*/complete.json"):
        file.write_text("{}")
    (tmp_path / "e2e" / "config.yaml").unlink()
    (tmp_path / "e2e" / "result.json").unlink()
    kept = sorted(path.name for path in (tmp_path / "e2e" / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=r"dgl: no checkpoint in .*The other runs have ended"):
        start(config, tmp_path, resume=True)
    assert (tmp_path / "e2e" / "result.json").is_file() and (tmp_path / "e2e" / "config.yaml").is_file()
    assert sorted(path.name for path in (tmp_path / "e2e" / "checkpoints").iterdir()) == kept
