"""``train.profile``: what a few steps of a run spend their time on, by operation and by kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from localgrad.config import Config
from localgrad.errors import ConfigError
from localgrad.train.experiment import Experiment
from localgrad.train.folder import PROFILE

TRACED = 3  # steps


@contextlib.contextmanager
def tracing(config: Config, folder: Path, run: Experiment) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each step.

    Writes ``profile/steps-FIRST-LAST.json.gz``, which https://ui.perfetto.dev and chrome://tracing show, and a table of
    the operations that took longest, ``.txt``. Nothing where the run has passed these steps already.

    Raises:
        ConfigError: the run ends before.
    """
    first = config.train.profile
    total = config.train.epochs * len(run.data.train)
    if first is not None and first + TRACED > total:
        raise ConfigError(
            f"train.profile={first} traces steps {first} to {first + TRACED - 1}, counted from 0, but the run has "
            f"{total}; name an earlier one"
        )
    if first is None or first <= run.step:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if run.network.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)

    def write(traced: profile) -> None:
        (folder / PROFILE).mkdir(exist_ok=True)
        name = folder / PROFILE / f"steps-{first}-{first + TRACED - 1}"
        traced.export_chrome_trace(f"{name}.json.gz")
        of = "self_cpu_time_total" if len(activities) == 1 else "self_device_time_total"
        name.with_suffix(".txt").write_text(traced.key_averages().table(sort_by=of, row_limit=40))

    when = schedule(skip_first=first - run.step - 1, wait=0, warmup=1, active=TRACED, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
