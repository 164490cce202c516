"""The command line as a program: an error of this project becomes one sentence on stderr and its exit code.

Exit codes: 0 good, 1 a finding, 2 wrong usage, 3 unsupported. 70 is a crash, with its traceback. 141 is a stdout that
was closed. Neither of the last two says anything about the checkpoint.
"""

import sys
import traceback
from typing import NoReturn

from ..errors import CheckpointError, ExportError, PublishError, ScanError, VerificationError
from ..launch.launcher import UsageError
from ..patches.errors import LockError, LockFileError, MetaTensorError, NotQwen2Error, Qwen2FP16FixError
from .commands import app, stderr
from .terminal import PrintError, replace_unknown_signs

CRASH = 70  # EX_SOFTWARE of sysexits.h


def main() -> None:
    """Runs the command line; an error this project raises becomes one sentence on stderr and its exit code."""
    replace_unknown_signs()
    try:
        app()
    except (UsageError, PrintError) as error:
        _fail(error, 2)
    except (
        CheckpointError,
        ExportError,
        LockFileError,
        MetaTensorError,
        NotQwen2Error,
        PublishError,
        ScanError,
        VerificationError,
    ) as error:
        _fail(error, 2)
    except LockError as error:
        _fail(error, 1)
    except Qwen2FP16FixError as error:
        _fail(error, 3)
    except OSError as error:
        if error.filename is None:
            _crash()
        _fail(f"{error.filename}: {error.strerror}: name another file or folder, or change its rights.", 2)
    except Exception:
        _crash()


def _crash() -> NoReturn:
    """Ends with the traceback. Python's own exit code is 1, which is a finding here."""
    traceback.print_exc()
    sys.exit(CRASH)


def _fail(error: Exception | str, code: int) -> None:
    stderr.print(f"qwen2-fp16-fix: {error}", markup=False)
    sys.exit(code)
