"""``train.profile`` traces three steps of a run, on a CPU too."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from rich.console import Console

from localgrad.config import Config, validate
from localgrad.errors import ConfigError
from localgrad.train.folder import RunFolder
from localgrad.train.run import run


def settings(first: int, epochs: int = 1) -> Config:
    return validate(
        {
            "method": ["dgl"], "model": {"name": "resnet8"}, "data": {"name": "digits", "limit": 140},
            "blocks": {"num_blocks": 2},
            "train": {"epochs": epochs, "batch_size": 16, "device": "cpu", "profile": first},
        },
        "test",
    )  # fmt: skip


def trained(config: Config, path: Path, **claim: bool) -> None:
    folder = RunFolder(path)
    folder.claim(**claim)
    try:
        run(config, folder, Console(quiet=True), "dgl", "")
    finally:
        folder.close()


def test_three_steps_are_traced(tmp_path: Path) -> None:
    trained(settings(4), tmp_path)
    (trace,) = tmp_path.glob("profile/*.json.gz")
    assert trace.name == "steps-4-6.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events]
    steps = sorted(int(name.split("#")[1]) for name in set(names) if name.startswith("ProfilerStep#"))
    assert steps == [4, 5, 6] and names.count("Optimizer.step#SGD.step") == 3
    assert "aten::convolution_backward" in (tmp_path / "profile" / "steps-4-6.txt").read_text()
    trained(settings(4), tmp_path, overwrite=True)  # which clears it
    trained(settings(2), tmp_path, resume=True)  # these steps have passed
    assert len(list(tmp_path.glob("profile/*"))) == 2


def test_steps_that_never_come_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="traces steps 50 to 52, counted from 0, but the run has 8"):
        trained(settings(50), tmp_path)
