"""Tables as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], text: Collection[int]) -> list[list[str]]:
    """Cells padded to the width of their column: to the right in the columns ``text``, to the left in the others."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [cell.ljust(w) if k in text else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]


def markdown(rows: Sequence[Sequence[str]], text: Collection[int]) -> list[str]:
    """Lines of a table whose first row are the headings."""
    first, *others = aligned(rows, text)
    rule = ["-" * len(cell) if k in text else "-" * max(1, len(cell) - 1) + ":" for k, cell in enumerate(first)]
    return ["| " + " | ".join(cells) + " |" for cells in (first, rule, *others)]
