"""Links of a built site that lead nowhere are found."""

from __future__ import annotations

from pathlib import Path

from broken_links import broken_links


def test_files_and_anchors_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a b.html").write_text('<h1 id="top">A</h1><a href="#top">1</a><a href="#gone">2</a>')
    (tmp_path / "deep" / "c.html").write_text(
        '<a href="../a%20b.html#top">1</a><a href="../a%20b.html#no">2</a><img src="d.png"><a href="https://x.org/y">3</a>'
    )
    assert broken_links(tmp_path) == ["a b.html: #gone", "deep/c.html: ../a%20b.html#no", "deep/c.html: d.png"]
