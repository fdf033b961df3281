"""What every test leaves as it found it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def process_settings() -> Iterator[None]:
    """Runs set threads and deterministic mode for the whole process; tests must not see each other's."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call imports for seconds
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def real_data() -> Path:
    """The folder of the real data sets; skips where there is none."""
    root = Path(os.environ.get("LOCALGRAD_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"needs the data sets in {root}")
    return root
