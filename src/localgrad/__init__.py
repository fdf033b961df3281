"""Supervised local learning for PyTorch: each block of a network trained by its own loss."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from localgrad.version import __version__ as __version__

if TYPE_CHECKING:
    from localgrad import cuts as cuts
    from localgrad import data as data
    from localgrad import heads as heads
    from localgrad import losses as losses
    from localgrad import methods as methods
    from localgrad import models as models
    from localgrad import spans as spans
    from localgrad import tasks as tasks
    from localgrad import testing as testing
    from localgrad.engine import backward as backward
    from localgrad.engine import features as features
    from localgrad.engine import local_losses as local_losses
    from localgrad.engine import local_outputs as local_outputs
    from localgrad.errors import CheckpointError as CheckpointError
    from localgrad.errors import ConfigError as ConfigError
    from localgrad.errors import DataError as DataError
    from localgrad.errors import LocalgradError as LocalgradError
    from localgrad.errors import MethodError as MethodError
    from localgrad.errors import PartitionError as PartitionError
    from localgrad.errors import TrainingError as TrainingError
    from localgrad.localization import localize as localize
    from localgrad.localization import separate_blocks as separate_blocks
    from localgrad.method import Method as Method
    from localgrad.method import Term as Term
    from localgrad.network import LocalNetwork as LocalNetwork
    from localgrad.network import exchange as exchange
    from localgrad.planning import plan as plan
    from localgrad.randomness import keyed_randomness as keyed_randomness
    from localgrad.residence import Residence as Residence
    from localgrad.residence import resident as resident
    from localgrad.single_loss import loss as loss
    from localgrad.site import Ramp as Ramp
    from localgrad.site import Site as Site
    from localgrad.task import Batch as Batch

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
    **dict.fromkeys(("Residence", "resident"), "localgrad.residence"),
    "loss": "localgrad.single_loss",
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
