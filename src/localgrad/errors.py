"""Typed errors. Every message says what was given, what is allowed, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LocalgradError(Exception):
    """Base of every error localgrad raises on purpose; the command line prints it as one paragraph."""


class ConfigError(LocalgradError, ValueError):
    """A setting is unknown, has the wrong type or contradicts another one."""


class PartitionError(LocalgradError, ValueError):
    """A model cannot be cut where it was asked to be."""


class MethodError(LocalgradError, ValueError):
    """A method cannot be built, composed or trained as asked."""


class DataError(LocalgradError):
    """A data set is missing, damaged or does not match the model."""


class CheckpointError(LocalgradError):
    """A checkpoint is torn, foreign, tampered with or belongs to another run."""


class TrainingError(LocalgradError):
    """Training cannot go on, for example because a loss is not finite."""


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """One sentence that answers an unknown ``name`` with the nearest known ones, or with all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"unknown {what} {name!r}; did you mean {' or '.join(repr(c) for c in close)}?"
    return f"unknown {what} {name!r}; known: {', '.join(known)}"
