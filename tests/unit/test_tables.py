"""Tables as Markdown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from localgrad.measure.tables import markdown

cells = st.text("abc 01.", min_size=1, max_size=6).map(str.strip).filter(bool)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=2, max_size=4)))
def test_a_reader_of_markdown_finds_every_cell(rows: list[list[str]]) -> None:
    text = range(0, len(rows[0]), 2)
    tokens = MarkdownIt().enable("table").parse("\n".join(markdown(rows, text)))
    assert [t.content for t in tokens if t.type == "inline"] == [cell for row in rows for cell in row]
    styles = [t.attrs.get("style", "") for t in tokens if t.type == "th_open"]
    assert styles == ["" if k in text else "text-align:right" for k in range(len(rows[0]))]
