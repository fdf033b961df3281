"""What every test leaves as it found it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Two workers with one thread each are faster than with two: the networks are small. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A commit passes or fails by what it changes, never by luck. `--hypothesis-profile=default` draws anew.
settings.register_profile("same examples", derandomize=True)
settings.load_profile("same examples")


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
    root = Path(os.environ.get("LOCALGRAD_DATA") or Path(__file__).parents[2] / "data")
    if not root.is_dir():
        pytest.skip(f"needs the data sets in {root}")
    return root


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print which plug-in works on which base, as tests/contract/test_composition.py found it."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, ())]
    found = {
        tuple(value[:2]): ("failed" if report.failed else "refused" if value[2] else "trains", value[2])
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == "composition"
    }
    if not found:
        return
    plugins, bases = (sorted({pair[k] for pair in found}) for k in (0, 1))
    terminalreporter.section("compositions: plug-in (row) on base (column)")
    width = max(map(len, plugins))
    terminalreporter.line(" " * width + "  " + "  ".join(bases))
    for plugin in plugins:
        cells = (found.get((plugin, base), ("not run", None))[0].ljust(len(base)) for base in bases)
        terminalreporter.line(plugin.ljust(width) + "  " + "  ".join(cells))
    for (plugin, base), (_, reason) in sorted(found.items()):
        if reason:
            terminalreporter.line(f"{plugin} on {base}: {reason}")
