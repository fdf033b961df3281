"""Pictures are those of the results that they were drawn from, and can be read."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import figures
from localgrad.measure.plots import KINDS, MARKERS, PALETTE, STYLE, WIDTH, drawing, label, series


def test_no_picture_is_older_than_its_sources() -> None:
    assert not figures.complaints()


def test_a_changed_source_an_unknown_and_a_missing_picture_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "results/exits-2026-11-28/exits.png"
    monkeypatch.setattr(figures, "FIGURES", {name: figures.FIGURES[name]})
    shutil.copytree(figures.ROOT / "results/exits-2026-11-28", tmp_path / "results/exits-2026-11-28")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"![known]({name}) ![elsewhere](https://a.b/c.png)\n")
    assert not figures.complaints(tmp_path)

    source = tmp_path / "results/exits-2026-11-28/exits.json"
    source.write_text(source.read_text().replace("1", "2", 1))
    (older,) = figures.complaints(tmp_path)
    assert name in older and "older" in older
    figures.draw(name, tmp_path)
    assert not figures.complaints(tmp_path)

    (tmp_path / "docs" / "page.md").write_text("![unknown](mine.png)\n")
    (unknown,) = figures.complaints(tmp_path)
    assert "docs/page.md shows docs/mine.png" in unknown
    (tmp_path / name).unlink()
    assert any("is not there" in complaint for complaint in figures.complaints(tmp_path))


def lightness(color: str) -> float:
    """L* of CIELAB, 0 to 100, which is what is left of a colour in grey."""
    channels = (int(color[k : k + 2], 16) / 255 for k in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_series_differ_in_grey() -> None:
    """The four kinds, which markers do not tell apart, by lightness; series by their markers and lines."""
    assert min(abs(lightness(a) - lightness(b)) for a, b in combinations(KINDS.values(), 2)) > 10
    assert len({series(k)["marker"] for k in range(len(MARKERS))}) == len(MARKERS) == 11
    together = len(PALETTE) * len(MARKERS)
    assert len({tuple(series(k).values()) for k in range(together)}) == together
    for k in range(together):
        assert all(series(k)[name] != series(k + 1)[name] for name in ("color", "marker", "linestyle"))


def test_type_is_large_enough_at_the_width_of_a_page() -> None:
    sizes = [size for name, size in STYLE.items() if name.endswith("size")]
    assert min(sizes) / 72 * 830 / WIDTH >= 9  # pixels of a picture that is shown 830 pixels wide


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8, unique=True))
def test_labels_lie_neither_on_points_nor_on_one_another(points: list[tuple[float, float]]) -> None:
    with drawing(Path("/dev/null"), height=4) as (figure, (axis,)):
        axis.set(xlim=(-0.5, 1.5), ylim=(-0.5, 1.5))
        notes = label(axis, points, [f"way {k}" for k in range(len(points))])
        boxes = [note.get_window_extent(figure.canvas.get_renderer()) for note in notes]
        texts = [super(type(note), note).get_window_extent(figure.canvas.get_renderer()) for note in notes]
    assert boxes and not any(a.overlaps(b) for a, b in combinations(texts, 2))
    at = axis.transData.transform(points)
    assert not any(box.contains(*point) for box in texts for point in at)
