"""Writes files that a user names, each completely or not at all. An error is one sentence."""

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..patches.errors import Qwen2FP16FixError
from .reading import not_a_file


def check_writable(path: Path, wanted: str, refusal: type[Qwen2FP16FixError]) -> Path:
    """The file that `write_whole` would write: `path`, or what its links lead to.

    Raises `refusal` if that is a device, a pipe or anything else that exists and is not a file, or if nothing can be
    written beside it. wanted: the kind of file to name instead, as "another file".
    """
    try:
        file = Path(os.path.realpath(path))
        _refuse_other_kinds(file, path, wanted, refusal)
        part = _part(file)
        _create(part)
        part.unlink()
    except OSError as error:
        raise refusal(_not_written(path, error, wanted)) from None
    return file


def write_whole(path: Path, make: Callable[[Path], object], wanted: str, refusal: type[Qwen2FP16FixError]) -> None:
    """Calls `make(part)` with an empty file beside `path` to write into, and renames that file to `path`.

    So `path` is the old file or the whole new one, also after a crash of the machine. A link stays a link: the file
    that it leads to is written. A device, a pipe or anything else that is not a file is left alone.
    wanted: the kind of file to name instead, as "another file". Raises `refusal` if the file cannot be written.
    """
    part = None
    try:
        file = Path(os.path.realpath(path))
        mode = _refuse_other_kinds(file, path, wanted, refusal)
        part = _part(file)
        _create(part, mode)
        make(part)
        sync(part)
        if mode is not None:
            with suppress(OSError):  # a file system that has no rights
                part.chmod(stat.S_IMODE(mode))
        part.replace(file)
    except OSError as error:
        raise refusal(_not_written(path, error, wanted)) from None
    finally:
        if part is not None:
            with suppress(OSError):  # it was not made, has become the file, or is on a disk that no longer answers
                part.unlink()
    settle(file.parent)


def _refuse_other_kinds(file: Path, path: Path, wanted: str, refusal: type[Qwen2FP16FixError]) -> int | None:
    """The mode of the file that is there; None if nothing is. Raises `refusal` for what is not a file."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return None
    kind = not_a_file(mode)
    if kind is not None:
        raise refusal(f"{path} cannot be written (it is {kind}): name {wanted}.")
    return mode


def _part(file: Path) -> Path:
    """A name beside `file` that no other process or thread takes, whatever container it runs in."""
    return file.with_name(f".qwen2-fp16-fix-{secrets.token_hex(8)}.part")  # short, however long the name is


def _create(part: Path, mode: int | None = None) -> None:
    """Makes an empty file. mode: of the file that it will replace: nobody else may read the new one in the meantime."""
    wanted = 0o666 if mode is None else stat.S_IMODE(mode) | stat.S_IRUSR | stat.S_IWUSR
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, wanted))  # less what the umask takes


def _not_written(path: Path, error: OSError, wanted: str) -> str:
    return f"{path} cannot be written ({error.strerror or error}): name {wanted}."


def settle(folder: Path) -> None:
    """Waits until a rename in `folder` is on the disk, where that can be waited for: it has been done either way."""
    with suppress(OSError):
        sync(folder)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk. Windows opens files only, and syncs only what is opened to write."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
