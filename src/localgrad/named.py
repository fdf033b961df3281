"""What a user names as ``module:function``: models, methods, tasks and data of their own."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from localgrad.errors import ConfigError

# Folders in which modules are looked for before all others; the command line puts the current one here.
SEARCHED: list[str] = []
_DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)*"


def is_named(name: str) -> bool:
    """Whether ``name`` has the form ``module:function``, both possibly with dots."""
    return re.fullmatch(f"{_DOTTED}:{_DOTTED}", name) is not None


def imported(name: str, what: str, hint: str = "") -> Any:
    """What ``module:function`` names; importing the module runs its code.

    Args:
        name: of that form.
        what: a model, method, ...; for messages.
        hint: what else may have been meant, for the message where there is no such module.

    Raises:
        ConfigError: no such module, one that cannot be imported, or none of this name in it.
    """
    module, _, path = name.partition(":")
    sys.path[:0] = [place for place in SEARCHED if place not in sys.path]
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{what} {name!r}: {module} imports {error.name}, which is not installed") from error
        raise ConfigError(
            f"{what} {name!r}: there is no module {module!r} in the current directory or among installed packages; "
            f"write module:function. {hint}".strip()
        ) from error
    except Exception as error:  # the module is the user's and may fail in any way
        raise ConfigError(
            f"{what} {name!r}: importing {module} failed: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigError(
                f"{what} {name!r}: {module} has no {path!r}; write module:function, a function of that module"
            )
        found = getattr(found, part)
    return found


def function(name: str, what: str, hint: str = "") -> Any:
    """As `imported`, for what must be called.

    Raises:
        ConfigError: also where it cannot be called.
    """
    found = imported(name, what, hint)
    if not callable(found):
        raise ConfigError(f"{what} {name!r} is a {type(found).__name__}; write module:function, a function")
    return found
