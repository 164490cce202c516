"""How the program ends: an error becomes one sentence on stderr, with an exit code that says what it was.

Exit codes: 0 good, 1 a finding, 2 wrong usage, 3 unsupported; an error class names its own. 70 is a crash, with its
traceback. 130 is Ctrl-C, 143 SIGTERM, 141 a stdout that was closed while it was written. Those from 70 on say nothing
about the checkpoint.
"""

import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from ..errors import BrokenInstallationError, first_line
from ..launch.launcher import UsageError
from ..patches.errors import Qwen2FP16FixError
from ..requirements import broken_requirement
from .terminal import PrintError, stderr

CRASH = 70  # EX_SOFTWARE of sysexits.h
#: Signals that end a program, besides Ctrl-C's. Windows has no SIGHUP.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def one_sentence() -> Iterator[None]:
    """For a block that is the program, or a command of it: ends the program for any error."""
    try:
        yield
    except typer.Exit:
        raise
    except (Qwen2FP16FixError, UsageError, PrintError) as error:
        _fail(error, error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted.", 128 + signal.SIGINT)
    except MemoryError:
        _fail("there is not enough memory for this: free some, or use a larger machine.", 2)
    except OSError as error:
        reason = error.strerror or first_line(error)
        if error.filename is not None:
            _fail(f"{error.filename}: {reason}: name another file or folder, or change its permissions.", 2)
        _fail_if_broken()
        _fail(f"the system refused something ({reason}): nothing more was done; repair that and start again.", 2)
    except Exception:
        _fail_if_broken()
        traceback.print_exc()
        sys.exit(CRASH)  # Python's own exit code is 1, which means a finding here


def _fail_if_broken() -> None:
    """Ends the program with a sentence if the error came of torch or transformers that cannot be imported."""
    problem = broken_requirement()
    if problem is not None:
        _fail(problem, BrokenInstallationError.exit_code)


def _fail(error: Exception | str, code: int) -> NoReturn:
    stderr.print(f"qwen2-fp16-fix: {error}", markup=False)
    sys.exit(code)


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command. Errors that typer would end with 1, which means a finding here, become sentences before."""

    @functools.wraps(command)
    def run(*arguments: Any, **named: Any) -> Any:
        try:
            return command(*arguments, **named)
        except (KeyboardInterrupt, EOFError, OSError):
            with one_sentence():
                raise

    return run


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises UsageError for an empty argument: `certify "$MODEL"` without that variable is not `certify .`.

    Those of a program that is run are its own.
    """
    for argument in () if arguments[:1] == ["run"] else arguments:
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            raise UsageError(f"an argument is empty ({argument!r}): give it a value, or leave it out.")


def check_current_folder() -> None:
    """Raises UsageError if the current folder has been deleted: some libraries then end the program themselves."""
    try:
        os.getcwd()
    except OSError:
        raise UsageError("the current folder is not there any more: change into one that is.") from None


@contextmanager
def ending_in_order() -> Iterator[None]:
    """For a block that is the program: SIGTERM and a closed terminal end it as Ctrl-C does, so that it cleans up.

    The second of these signals is ignored: `timeout` sends two, and the first has work to finish.
    """
    before: dict[int, Any] = {}

    def end(number: int, frame: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        # a signal that is ignored, as SIGHUP under `nohup`, stays so
        wanted = [number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL]
        before = {number: signal.signal(number, end) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
