"""Links between the pages point at something that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import localgrad

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name not in ("methods", "reference")),
    *sorted((ROOT / "results").rglob("*.md")),
]

# Pages that the site makes of the registry of methods and of docstrings.
MADE = {ROOT / "docs" / "methods" / f"{name}.md" for name in (*localgrad.methods.__all__, "index")}
MADE |= {ROOT / "docs" / "reference" / "index.md"}


def prose(page: Path) -> str:
    """What is not code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Those that a page has by its headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target in MADE or (target.exists() and target.is_relative_to(ROOT)), link
        assert not anchor or anchor in anchors(target), link


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        if page.name == "CHANGELOG.md" or page.is_relative_to(ROOT / "results"):  # these tell of files that are gone
            continue
        for name in re.findall(r"`((?:src|bench|tests|scripts|docs|results)/[\w/.-]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
