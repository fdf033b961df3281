"""Supervised local learning for PyTorch: each block of a network trained by its own loss."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

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
    from localgrad.method import Batch, Method, Ramp, Site, Term
    from localgrad.network import LocalNetwork, localize, separate_blocks
    from localgrad.planning import plan
    from localgrad.randomness import keyed_randomness
    from localgrad.twins import exchange

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
    "exchange": "localgrad.twins",
    **dict.fromkeys(("Batch", "Method", "Ramp", "Site", "Term"), "localgrad.method"),
    **dict.fromkeys(("LocalNetwork", "localize", "separate_blocks"), "localgrad.network"),
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
