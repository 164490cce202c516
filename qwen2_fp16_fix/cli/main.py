"""The command line as a program: an error of this project becomes one sentence on stderr and its exit code.

Exit codes: 0 good, 1 a finding, 2 wrong usage, 3 unsupported; an error class names its own. 70 is a crash, with its
traceback. 141 means that stdout was closed. The last two say nothing about the checkpoint.
"""

import sys
import traceback
from typing import NoReturn

from ..errors import BrokenInstallationError
from ..launch.launcher import UsageError
from ..patches.errors import Qwen2FP16FixError
from ..requirements import broken_requirement
from .commands import app
from .terminal import PrintError, replace_unknown_signs, stderr

CRASH = 70  # EX_SOFTWARE of sysexits.h


def main() -> None:
    """Runs the command line. An error of this project becomes one sentence on stderr and its exit code."""
    replace_unknown_signs()
    try:
        app()
    except (Qwen2FP16FixError, UsageError, PrintError) as error:
        _fail(error, error.exit_code)
    except OSError as error:
        if error.filename is None:
            _fail_if_broken()
            _crash()
        _fail(f"{error.filename}: {error.strerror}: name another file or folder, or change its rights.", 2)
    except Exception:
        _fail_if_broken()
        _crash()


def _fail_if_broken() -> None:
    """Ends the program with a sentence if the error came of torch or transformers that cannot be imported."""
    problem = broken_requirement()
    if problem is not None:
        _fail(problem, BrokenInstallationError.exit_code)


def _crash() -> NoReturn:
    """Ends the program with the traceback. Python's own exit code is 1, which means a finding here."""
    traceback.print_exc()
    sys.exit(CRASH)


def _fail(error: Exception | str, code: int) -> NoReturn:
    stderr.print(f"qwen2-fp16-fix: {error}", markup=False)
    sys.exit(code)
