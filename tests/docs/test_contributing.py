"""Every file of CONTRIBUTING.md, copied as it is printed, passes the checks that are printed below it."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import localgrad
from localgrad.data.sources import SOURCES
from localgrad.method import Method

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (An? [\w ]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    sources = dict(SOURCES)
    yield
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(tmp_path):
            package, _, leaf = name.rpartition(".")
            vars(sys.modules[package]).pop(leaf, None)
            del sys.modules[name]
    SOURCES.clear()
    SOURCES.update(sources)


def copied(code: str, folder: Path) -> ModuleType:
    """The module at the path in the first line of ``code``, as if it were there; it must not be there yet."""
    match = re.match(r"# src/(localgrad/\S+)\.py\n", code)
    assert match is not None, code[:60]
    name = match.group(1).replace("/", ".")
    assert importlib.util.find_spec(name) is None, f"{name} exists"
    file = folder / f"{name}.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    package, _, leaf = name.rpartition(".")
    setattr(sys.modules[package], leaf, module)
    return module


def test_there_is_a_section_for_every_extension_point() -> None:
    assert [*SECTIONS] == [
        f"A {what}" for what in ("method", "head", "loss", "bridge", "rule", "task", "data set", "model")
    ]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_file_passes_the_checks_below_it(section: str, tmp_path: Path) -> None:
    file, *checks = re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    module = copied(file, tmp_path)
    assert checks
    assert doctest.testmod(module).failed == 0
    for check in checks:
        assert "assert" in check
        exec(compile(check, section, "exec"), {})  # noqa: S102


@pytest.mark.parametrize("section", ["A method", "A rule"])
def test_a_method_is_answered_composed_and_printed_as_the_others_are(section: str, tmp_path: Path) -> None:
    (file, *_) = re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    module = copied(file, tmp_path)
    name = module.__name__.rpartition(".")[2]
    make = getattr(module, name)
    task = localgrad.tasks.classification(10)
    with pytest.raises(localgrad.MethodError, match=rf"{name} is a (base and takes a task|plug-in and takes a method)"):
        make(10)
    base = make(task) if section == "A method" else make(localgrad.methods.dgl(task))
    composed = localgrad.methods.windows(base)
    assert isinstance(composed, Method) and str(composed).startswith(f"windows({base.name})")
