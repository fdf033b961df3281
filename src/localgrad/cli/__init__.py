"""The command line. Commands are thin, one to a file; torch is imported when one runs."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer

from localgrad import named
from localgrad.cli.bench import bench
from localgrad.cli.compare import compare
from localgrad.cli.demo import demo
from localgrad.cli.doctor import doctor
from localgrad.cli.evaluate import evaluate
from localgrad.cli.export import export
from localgrad.cli.listing import list_
from localgrad.cli.plan import plan
from localgrad.cli.predict import predict
from localgrad.cli.simulate import simulate
from localgrad.cli.summary import summary
from localgrad.cli.survey import survey
from localgrad.cli.train import train
from localgrad.errors import LocalgradError

app = typer.Typer(
    name="localgrad",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Supervised local learning for PyTorch: cut a network into blocks, train each by its own loss, and free its "
    "activations before the next one runs.",
    epilog="Begin with: localgrad demo",
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo, "train": train, "eval": evaluate, "predict": predict, "export": export, "simulate": simulate,
    "list": list_, "summary": summary, "doctor": doctor, "survey": survey, "plan": plan, "bench": bench,
    "compare": compare,
}  # fmt: skip
_held = contextlib.ExitStack()  # the standard error of ranks whose words another one says too


def _heard(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, which is called once its arguments are understood: what is said from then on is a rank's own."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        _held.close()
        named.SEARCHED[:] = [os.getcwd()]  # modules of the user's lie where the command is typed
        command(*args, **options)

    return run


for _name, _command in _COMMANDS.items():  # in the order of the help
    app.command(_name)(_heard(_command))


def _paragraph(text: str) -> str:
    width = min(100, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _warning(message: Warning | str, category: object, filename: str, lineno: int, line: str | None = None) -> str:
    return _paragraph(f"warning: {message}") + "\n"


def _fail(message: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # of a terminal that is gone
        print(_paragraph(f"error: {message}"), file=sys.stderr)
    raise SystemExit(code)


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """A thread that could not write (TensorBoard's) hands its error on to who waits for it, which says it once."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


@contextlib.contextmanager
def _one_paragraph() -> Iterator[None]:
    try:
        yield
    except LocalgradError as error:
        _fail(str(error), 130 if type(error).__name__ == "Interrupted" else 2)
    except SystemExit as error:
        if error.code == 130:  # how typer ends on Ctrl-C
            _fail("stopped; what was not checkpointed is lost", 130)
        raise
    except BrokenPipeError:
        raise SystemExit(1) from None
    except OSError as error:
        what = f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else str(error)
        _fail(f"{what}; check the path, its permissions and the space left there", 2)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # Python would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors of localgrad end as one paragraph and exit code 2, an interruption as 130."""
    warnings.formatwarning, threading.excepthook = _warning, _thread_failed
    with _one_paragraph(), _held:
        if (
            os.environ.get("RANK", "0") != "0"
        ):  # torchrun started several of us: the first says what is wrong with a usage
            _held.enter_context(contextlib.redirect_stderr(io.StringIO()))
        app(arguments)


__all__ = ["app", "main"]
