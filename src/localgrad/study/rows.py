"""Files of JSON lines that a stopped process leaves readable."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def read_rows(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """The rows of a file by what they have as ``key``, the last of each; one not written to its end is left out."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[row[key]] = row
    return rows


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Append one line, on a line of its own even behind one that was not written to its end."""
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
