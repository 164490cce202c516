"""A folder that is there whole or not at all: written beside its place under another name, then renamed."""

import errno
import glob
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ExportError

logger = logging.getLogger("qwen2_fp16_fix")

HOST = re.sub(r"\W", "_", platform.node())[:32]


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to write into: it becomes `out` when the block ends, and is removed if that raises.

    out: an absolute path to nothing, or to an empty folder. What an export that was killed has left is removed first.
    Raises ExportError where `out` cannot be taken, and for an OSError of the block.
    """
    check_place(out)
    written = out.parent / f"{_prefix(out)}{os.getpid()}-{secrets.token_hex(3)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        written.mkdir()
        yield written
        _flush(written)
        if os.name == "nt" and out.is_dir():
            out.rmdir()  # there, a rename does not replace an empty folder
        written.rename(out)
        _flush_folder(out.parent)
    except OSError as error:
        raise ExportError(_sentence(error, out)) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)


def check_place(out: Path) -> None:
    """Raises ExportError unless `out` is nothing yet, or an empty folder."""
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ExportError(f"{out} is not a folder: name a new one.")
        if out.is_dir() and any(out.iterdir()):
            raise ExportError(f"{out} is not empty: name a new folder, or empty this one.")
    except OSError as error:
        raise ExportError(_sentence(error, out)) from error


def remove_leftovers(out: Path) -> None:
    """Removes what killed exports to `out` have left, and names what may belong to one that still runs."""
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.exporting-*")):
        if path.name.startswith(_prefix(out)) and not _is_running(path.name.removeprefix(_prefix(out))):
            shutil.rmtree(path)
            logger.warning("removed %s, which an interrupted export had left", path)
        else:
            logger.warning("%s is another export's: delete it if none is running", path)


def _prefix(out: Path) -> str:
    return f".{out.name}.exporting-{HOST}-"


def _is_running(rest: str) -> bool:
    """Whether the process still runs whose number `rest` begins with."""
    number = rest.partition("-")[0]
    if os.name == "nt" or not number.isdigit():  # there, a signal would end it
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _flush(folder: Path) -> None:
    """Waits until everything in the folder is on the disk: a rename may be there before the data it names."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
        else:
            with path.open("rb" if os.name != "nt" else "r+b") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sentence(error: OSError, out: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {out} was not written; make room, or name a folder on another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        where = error.filename2 or error.filename or out
        return f"{where} may not be read or written: {out} was not written; name another folder or change its rights."
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        return f"{out} cannot be made, something else is there: nothing was written; name another folder."
    return f"{out} was not written: {error.strerror or error} ({error.filename or out})."
