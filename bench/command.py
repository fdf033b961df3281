"""One command of localgrad in a process that does nothing else."""

from __future__ import annotations

import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path


def exit_code(words: list[str], said: Path) -> int:
    """How ``localgrad WORDS`` ends, 1 for an error it does not expect; what it prints goes to the file ``said``."""
    from localgrad.cli import main

    with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            main(words)
        except SystemExit as end:
            return int(end.code or 0)
        except BaseException:
            traceback.print_exc(file=file)
            return 1
    return 0
