"""Versions that stand twice agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from packaging.version import Version

import localgrad

ROOT = Path(__file__).parents[2]


def test_the_lowest_versions_are_those_of_the_dependencies() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", one).groups() for one in wanted)
    pinned = dict(line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().split())
    assert {name: Version(pin) for name, pin in pinned.items()} == {n: Version(bound) for n, bound in bounds.items()}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == localgrad.__version__
