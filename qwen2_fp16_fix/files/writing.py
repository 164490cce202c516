"""Writes the files and folders that a user names, each whole or not at all. An error is one sentence."""

import errno
import glob
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..patches.errors import Qwen2FP16FixError

logger = logging.getLogger("qwen2_fp16_fix")

HOST = re.sub(r"\W", "_", platform.node())[:32]


def write_whole(path: Path, make: Callable[[Path], object], wanted: str, refusal: type[Qwen2FP16FixError]) -> None:
    """Calls `make(part)` with a temporary path beside `path`, and renames that file to `path`.

    So `path` is the old file or the whole new one. wanted: the kind of file to name instead, as "another file".
    Raises `refusal` if the file cannot be written.
    """
    part = path.with_name(f".qwen2-fp16-fix-{os.getpid()}.part")  # short, however long the name of the file is
    try:
        make(part)
        part.replace(path)
    except OSError as error:
        raise refusal(f"{path} cannot be written ({error.strerror}): name {wanted}.") from None
    finally:
        with suppress(OSError):  # a part that could not be made cannot be removed either
            part.unlink()


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
        yield written
        flush(written)
        if os.name == "nt" and out.is_dir():
            out.rmdir()  # there, a rename does not replace an empty folder
        written.rename(out)
        _sync(out.parent)
    except OSError as error:
        raise refusal(_sentence(error, out)) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _check_place(out: Path, refusal: type[Qwen2FP16FixError]) -> None:
    """Raises `refusal` unless `out` is nothing yet, or an empty folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise refusal(f"{out} is not a folder: name a new one.")
    if out.is_dir() and any(out.iterdir()):
        raise refusal(f"{out} is not empty: name a new folder, or empty this one.")


def _remove_leftovers(out: Path, prefix: str) -> None:
    """Removes the folders of killed exports to `out`, and names those that a running export may still write to."""
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.exporting-*")):
        if path.name.startswith(prefix) and not _is_running(path.name.removeprefix(prefix).partition("-")[0]):
            shutil.rmtree(path)
            logger.warning("removed %s, which an interrupted export had left", path)
        else:
            logger.warning("%s is another export's: delete it if none is running", path)


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


def flush(folder: Path) -> None:
    """Waits until the whole folder is on the disk. Otherwise a rename may reach the disk before the files do."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk. Windows opens no folder, and syncs only a file opened to write."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sentence(error: OSError, out: Path) -> str:
    """The error as one sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {out} was not written; make room, or name a folder on another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        where = error.filename2 or error.filename or out
        return f"{where} may not be read or written: {out} was not written; name another folder or change its rights."
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        return f"{out} cannot be made, something else is there: nothing was written; name another folder."
    return f"{out} was not written: {error.strerror or error} ({error.filename or out})."
