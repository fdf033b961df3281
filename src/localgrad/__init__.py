"""Supervised local learning for PyTorch: each block of a network trained by its own loss."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from localgrad.version import __version__ as __version__

if TYPE_CHECKING:
    from localgrad import cuts, data, heads, losses, methods, models, spans, tasks, testing
    from localgrad.engine import backward, features, local_losses, local_outputs
    from localgrad.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        LocalgradError,
        MethodError,
        PartitionError,
        TrainingError,
    )
    from localgrad.localization import localize, separate_blocks
    from localgrad.method import Method, Term
    from localgrad.network import LocalNetwork, exchange
    from localgrad.planning import plan
    from localgrad.randomness import keyed_randomness
    from localgrad.site import Ramp, Site
    from localgrad.task import Batch

# Imported on first use: the command line answers `--help` without waiting for torch.
_HOME = {
    **dict.fromkeys(("backward", "features", "local_losses", "local_outputs"), "localgrad.engine"),
    **dict.fromkeys(
        (
            "CheckpointError",
            "ConfigError",
            "DataError",
            "LocalgradError",
            "MethodError",
            "PartitionError",
            "TrainingError",
        ),
        "localgrad.errors",
    ),
    "Batch": "localgrad.task",
    **dict.fromkeys(("Ramp", "Site"), "localgrad.site"),
    **dict.fromkeys(("Method", "Term"), "localgrad.method"),
    **dict.fromkeys(("LocalNetwork", "exchange"), "localgrad.network"),
    **dict.fromkeys(("localize", "separate_blocks"), "localgrad.localization"),
    "keyed_randomness": "localgrad.randomness",
    "plan": "localgrad.planning",
}
_MODULES = ("cuts", "data", "heads", "losses", "methods", "models", "spans", "tasks", "testing")

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"localgrad.{name}")
    raise AttributeError(f"module 'localgrad' has no attribute {name!r}")
