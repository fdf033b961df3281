"""Code in the README, the docs and the docstrings runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import localgrad

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(localgrad.__path__, "localgrad.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, str(page), "exec"), names)  # noqa: S102


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_every_method_shows_an_example_and_its_source() -> None:
    for name in localgrad.methods.__all__:
        text = getattr(localgrad.methods, name).__doc__ or ""
        assert ">>>" in text, name
        assert "Args:" in text, name


def test_commands_of_the_readme_exist() -> None:
    from typer.main import get_command

    from localgrad.cli import app

    commands = get_command(app).commands
    text = (ROOT / "README.md").read_text()
    for command in re.findall(
        r"localgrad ([a-z]+)", " ".join(re.findall(r"```(?:sh|console)?\n(.*?)```", text, re.DOTALL))
    ):
        assert command in commands, command
