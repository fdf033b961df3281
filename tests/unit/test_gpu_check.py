"""``scripts/gpu_check.sh`` is bash, and says what is missing. Its dry run takes minutes: docs/benchmarks.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from localgrad.cli import app

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a bash script")


def test_no_gpu_is_said(tmp_path: Path) -> None:
    environment = {"GPU_CHECK_RESULTS": str(tmp_path), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    refused = subprocess.run(["bash", str(SCRIPT)], env=os.environ | environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "torch sees no GPU; GPU_CHECK_DEVICE=cpu makes a dry run" in refused.stderr
    assert not any(tmp_path.iterdir())


def test_every_option_it_gives_to_localgrad_exists() -> None:
    commands = get_command(app).commands
    text = re.sub(r"\\\\\n\s*", "", SCRIPT.read_text())
    used = re.findall(r"-m localgrad (\w+)(.*)", text)
    assert {command for command, _ in used} >= {"doctor", "list", "bench", "train"}
    for command, rest in used:
        known = {option for parameter in commands[command].params for option in parameter.opts}
        assert set(re.findall(r"(--[a-z][a-z-]+)", rest)) <= known, command
