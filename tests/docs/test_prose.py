"""Sentences of the README and the docs are short."""

from __future__ import annotations

from pathlib import Path

import pytest

import prose


@pytest.mark.parametrize("page", prose.pages(), ids=lambda page: page.name)
def test_sentences_of_a_page_are_short(page: Path) -> None:
    assert not prose.complaints(page)


def test_code_tables_and_targets_of_links_do_not_count() -> None:
    text = """---
kernelspec: {name: python3}
---
# A heading of many words that is no sentence

One `x = 1; y = 2` here, see [the log](../results/log.md). It ends; it goes on. Su et al. wrote it.

| a cell. Another | b |
|---|---|

- An item of
  two lines
- Another, e.g. this

```python
a. B. C.
```

    indented. Code.
"""
    found = prose.sentences(text)
    assert found == [
        "One `code` here, see the log.",
        "It ends; it goes on.",
        "Su et al wrote it.",
        "An item of two lines",
        "Another, e.g this",
    ]
    assert [prose.words(sentence) for sentence in found] == [6, 5, 5, 5, 3]
