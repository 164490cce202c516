"""Writes a folder that a user names, completely or not at all. An error is one sentence."""

import errno
import glob
import logging
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..patches.errors import Qwen2FP16FixError
from .writing import settle, sync

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("qwen2_fp16_fix")

HOST = re.sub(r"\W", "_", platform.node())[:32]


@contextmanager
def whole_folder(out: Path, refusal: type[Qwen2FP16FixError]) -> Iterator[Path]:
    """A new folder beside `out` to write into. It becomes `out` when the block ends, and is removed if that raises.

    out: an absolute path to nothing, or to an empty folder. The remains of killed exports to `out` are removed first.
    Raises `refusal` if `out` is something else, and for an OSError of the block.
    """
    prefix = f".{out.name}.exporting-{HOST}-"
    written = out.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(3)}"
    try:
        _check_place(out, refusal)
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out, prefix)
        written.mkdir()
        with _marked_as_ours(written):
            yield written
            flush(written)
            if os.name == "nt" and out.is_dir():
                out.rmdir()  # there, a rename does not replace an empty folder
            written.rename(out)
    except OSError as error:
        raise refusal(_sentence(error, out)) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)
    settle(out.parent)


def _check_place(out: Path, refusal: type[Qwen2FP16FixError]) -> None:
    """Raises `refusal` unless `out` is nothing yet, or an empty folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise refusal(f"{out} is not a folder: name a new one.")
    if out.is_dir() and any(out.iterdir()):
        raise refusal(f"{out} is not empty: name a new folder, or empty this one.")


def _remove_leftovers(out: Path, prefix: str) -> None:
    """Removes the folders of killed exports to `out`, and names those that a running export may still write to."""
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.exporting-*")):
        ours = path.name.startswith(prefix)
        if ours and not _is_running(path.name.removeprefix(prefix).partition("-")[0]) and not _is_marked(path):
            shutil.rmtree(path)
            logger.warning("removed %s, which an interrupted export had left", path)
        else:
            logger.warning("%s belongs to another export: delete it if none is running", path)


def _is_running(process: str) -> bool:
    """Whether the process with this number still runs. True if that cannot be found out."""
    if os.name == "nt" or not process.isdigit():  # on Windows the signal 0 would end the process
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _marked_as_ours(folder: Path) -> Iterator[None]:
    """Locks the folder while the block runs. Two containers may share a host's name and not see each other's processes.

    A file system without locks is left without one. Windows cannot rename a folder that is open.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_marked(folder: Path) -> bool:
    """Whether another export has locked the folder. True if that cannot be found out."""
    if sys.platform == "win32":
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def flush(folder: Path) -> None:
    """Waits until the whole folder is on the disk. Otherwise a rename may reach the disk before the files do."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _sentence(error: OSError, out: Path) -> str:
    """The error as one sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {out} was not written; free some space, or name a folder on another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        where = error.filename2 or error.filename or out
        return (
            f"{where} cannot be read or written: {out} was not written; name another folder or change the permissions."
        )
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        return f"{out} cannot be created, since something else is there: nothing was written; name another folder."
    return f"{out} was not written: {error.strerror or error} ({error.filename or out})."
