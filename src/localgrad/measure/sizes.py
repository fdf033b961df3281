"""Sizes as people write them."""

from __future__ import annotations

import re

from localgrad.errors import ConfigError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(count: float) -> str:
    """Bytes as people read them: ``7.51 GiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def read_memory(text: str | int) -> int:
    """``8GiB``, ``7500 MB`` or a number of bytes, in bytes.

    Raises:
        ConfigError: for anything else, or nothing.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    unit = (match[2].upper() or "B") if match else ""
    if match is None or unit not in UNITS or not (count := int(float(match[1]) * UNITS[unit])) > 0:
        raise ConfigError(f"memory={text!r}; write a size above 0 with its unit, for instance 8GiB, 7500MB or 512MiB")
    return count
