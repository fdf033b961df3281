"""Each tracker holds, offline, what metrics.csv holds: once, also where a run was stopped and goes on."""

from __future__ import annotations

import csv
import json
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from localgrad.config import Config, dump, validate
from localgrad.errors import ConfigError, TrainingError
from localgrad.train.experiment import build
from localgrad.train.folder import RunFolder
from localgrad.train.loggers import LOGGERS
from localgrad.train.loop import train

Points = dict[tuple[str, int], list[float]]  # values by name and epoch


class Stop(Exception):
    """Stands for a kill."""


class Own:
    """A logger of the user's."""

    made: ClassVar[list[tuple[Path, str, dict[str, Any]]]] = []
    told: ClassVar[list[int]] = []

    def __init__(self, folder: Path, key: str, settings: dict[str, Any]) -> None:
        self.made.append((folder, key, settings))

    def log(self, history: Sequence[dict[str, float]]) -> None:
        self.told.append(len(history))

    def close(self) -> None:
        self.told.append(-1)


class Broken(Own):
    def log(self, history: Sequence[dict[str, float]]) -> None:
        if history:
            raise ConnectionError("no route")


class Unmade(Own):
    def __init__(self, *_: Any) -> None:
        raise NotImplementedError


def config(*loggers: str) -> Config:
    small = {
        "method": ["dgl"], "model": {"name": "resnet8"}, "blocks": {"num_blocks": 2},
        "data": {"name": "digits", "limit": 100, "augment": False},
        "train": {"epochs": 3, "batch_size": 40, "threads": 1, "device": "cpu", "loggers": list(loggers)},
    }  # fmt: skip
    return validate(small, "test")


def go(config: Config, path: Path, *, resume: bool = False, stop_after: int | None = None) -> str:
    """The key of the run."""
    folder = RunFolder(path)
    folder.claim(resume=resume)
    state = build(config)
    folder.begin(dump(config))
    folder.open(state)

    def after_epoch(state: Any) -> None:
        folder.finish_epoch(state)
        if state.epoch == stop_after:
            raise Stop

    try:
        train(state, lambda _: None, after_epoch)
    except Stop:
        pass
    finally:
        folder.close()
    return folder.key


def of_tensorboard(path: Path, key: str) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    points: Points = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            points.setdefault((name, event.step), []).append(event.value)
    return points


def of_wandb(path: Path, key: str) -> Points:
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted((path / "wandb").glob(f"offline-run-*/run-{key}.wandb"))
    assert len(files) == 2  # both of one run; offline the later one begins with the first epoch
    points: Points = {}
    for data in records(files[-1].read_bytes()):
        record = Record.FromString(data)
        for item in record.history.item if record.HasField("history") else ():
            name = item.key or "/".join(item.nested_key)
            if not name.startswith("_"):
                points.setdefault((name, record.history.step.num), []).append(json.loads(item.value_json))
    return points


def records(data: bytes) -> Iterator[bytes]:
    """Of a log in the format of LevelDB: blocks of 32 KiB; a record or part of one has a checksum, a length, a kind."""
    whole, at = b"", 7  # after the name of the format
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for another header in this block
            at += 2**15 - at % 2**15
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def of_mlflow(path: Path, key: str) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("localgrad")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["blocks.num_blocks"] == "2"
    points: Points = {}
    for name in found.data.metrics:
        for metric in client.get_metric_history(found.info.run_id, name):
            points.setdefault((name, metric.step), []).append(metric.value)
    return points


def of_trackio(path: Path, key: str) -> Points:
    database = sqlite3.connect(path.parent / "trackio" / "localgrad.db")
    points: Points = {}
    for name, step, values in database.execute("SELECT run_name, step, metrics FROM metrics"):
        assert name == f"{path.name}-{key}"
        for metric, value in json.loads(values).items():
            points.setdefault((metric, step), []).append(value)
    return points


@pytest.mark.filterwarnings("default")  # of their own code
@pytest.mark.parametrize("name", [name for name in LOGGERS if name != "csv"])
def test_a_tracker_holds_each_epoch_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # SQLite takes seconds
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in [module for module in sys.modules if module.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it reads its directory when it is imported
    pytest.importorskip(name)
    path = tmp_path / "run"
    key = go(config("csv", name), path, stop_after=2)
    if name == "wandb":
        time.sleep(1.1)  # offline a file is named by the second in which it was begun
    assert go(config("csv", name), path, resume=True) == key
    rows = list(csv.DictReader((path / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 3 and "train/loss/block 1" in rows[0]
    figures = [{n: float(v) for n, v in row.items() if n not in ("epoch", "step")} for row in rows]
    expected = {(n, epoch): [value] for epoch, row in enumerate(figures, 1) for n, value in row.items()}
    read, deadline = globals()[f"of_{name}"], time.monotonic() + 20
    while (found := read(path, key)).keys() != expected.keys() and time.monotonic() < deadline:
        time.sleep(0.2)  # a service of its own may still be writing
    assert found.keys() == expected.keys()
    assert all(found[at] == pytest.approx(values, rel=1e-6) for at, values in expected.items())
    assert not capfd.readouterr().out  # which is for what a command answers


def test_a_logger_of_ones_own_is_told_of_the_whole_run(tmp_path: Path) -> None:
    Own.made, Own.told = [], []
    key = go(config(f"{__name__}:Own"), tmp_path, stop_after=1)
    go(config("csv"), tmp_path, resume=True, stop_after=2)  # loggers may change in mid-run
    assert go(config(f"{__name__}:Own"), tmp_path, resume=True) == key
    assert Own.told == [0, 1, -1, 2, 3, -1]
    assert [made[:2] for made in Own.made] == [(tmp_path, key)] * 2
    assert Own.made[0][2]["train.epochs"] == 3 and len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_one_process_of_several_logs(tmp_path: Path) -> None:
    Own.made = []
    folder, state = RunFolder(tmp_path), build(config(f"{__name__}:Own"))
    folder.first = False
    folder.open(state)
    train(state, lambda _: None, folder.finish_epoch)
    folder.close()
    assert not Own.made


def test_what_is_missing_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("localgrad.train.experiment.load_data", lambda *_: pytest.fail("data were read"))
    (tmp_path / "wandb").mkdir()  # what an earlier run left: no package
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"train\.loggers=wandb.*pip install 'localgrad\[wandb\]'"):
        build(config("csv", "wandb"))
    with pytest.raises(ConfigError, match=r"unknown logger 'tensorbord'; did you mean 'tensorboard'.*module:Class"):
        build(config("tensorbord"))
    with pytest.raises(ConfigError, match="no module 'nowhere'"):
        build(config("nowhere:Logger"))


def test_a_logger_that_fails_leaves_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match="Broken failed after the checkpoint was written: ConnectionError: no route"
    ):
        go(config(f"{__name__}:Broken"), tmp_path)
    assert list((tmp_path / "checkpoints").glob("step*/complete.json"))
    go(config("csv"), tmp_path, resume=True)
    with pytest.raises(ConfigError, match="Unmade cannot begin: NotImplementedError"):
        go(config(f"{__name__}:Unmade"), tmp_path / "other")


def test_another_run_in_the_same_place_has_another_key(tmp_path: Path) -> None:
    settings = config("csv")
    key = go(settings, tmp_path, stop_after=1)
    other = RunFolder(tmp_path)
    other.claim(overwrite=True)
    other.begin(dump(settings))
    other.close()
    assert other.key != key and len(key) == 12
