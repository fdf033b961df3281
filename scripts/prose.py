"""How long the sentences of README.md and docs are: at most 17 words on average a page, and none above 35.

    python scripts/prose.py            # every page, and every sentence that is too long
    python scripts/prose.py docs/own.md

Code, tables, headings and link targets do not count. What stands in backticks counts as one word.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MEAN, LONGEST = 17, 35
FENCE = re.compile(r"^(?P<mark>`{3,}|~{3,}).*?^(?P=mark)`*\s*?$", re.MULTILINE | re.DOTALL)
FRONT_MATTER = re.compile(r"\A---\n.*?^---$", re.MULTILINE | re.DOTALL)
ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|et al|vs|cf|approx|no)\.(?= )", re.IGNORECASE)
END = re.compile(r"(?<=[.!?])[)\"'*_]*\s+(?=[A-Z0-9\"'(*_`\[+-])")


def pages() -> list[Path]:
    """README.md and every page of docs that is written by hand."""
    made = {"methods", "reference"}
    docs = (page for page in (ROOT / "docs").rglob("*.md") if not made & {*page.relative_to(ROOT / "docs").parts[:-1]})
    return [ROOT / "README.md", *sorted(docs)]


def sentences(text: str) -> list[str]:
    """Those of a page in Markdown."""
    text = FENCE.sub("", FRONT_MATTER.sub("", text))
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        bare = line.strip()
        if not bare or bare.startswith(("|", "#", "<", "![")) or (line.startswith("    ") and not paragraphs[-1]):
            paragraphs.append([])
        elif ITEM.match(line):
            paragraphs.append([ITEM.sub("", line)])
        else:
            paragraphs[-1].append(bare)
    return [one for lines in paragraphs for one in END.split(_plain(" ".join(lines))) if words(one)]


def _plain(paragraph: str) -> str:
    """Without marks: code is one word, a link is its text."""
    paragraph = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", paragraph)
    paragraph = re.sub(r"`[^`]+`", "`code`", paragraph)
    paragraph = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", paragraph)
    return ABBREVIATION.sub(r"\1", paragraph)


def words(sentence: str) -> int:
    """How many there are."""
    return len([word for word in sentence.split() if re.search(r"\w", word)])


def complaints(page: Path) -> list[str]:
    """What is wrong with a page; nothing if it reads well."""
    found = sentences(page.read_text(encoding="utf-8"))
    name = page.relative_to(ROOT)
    wrong = [f"{name}: {words(one)} words: {one}" for one in found if words(one) > LONGEST]
    mean = statistics.mean(map(words, found)) if found else 0
    return wrong if mean <= MEAN else [f"{name}: {mean:.1f} words a sentence, more than {MEAN}", *wrong]


def main(names: list[str]) -> int:
    """Print what is wrong; 1 if anything is."""
    wrong = [line for page in ([Path(name).resolve() for name in names] or pages()) for line in complaints(page)]
    print("\n".join(wrong) or "No sentence is too long.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
