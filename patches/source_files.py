"""Files of code on the disk, and digests of them that do not depend on where and how they were installed.

A digest is SHA-256 of a file's bytes. In a .py the two bytes that end a line on Windows count as one, as they do for
Python, so a checkout there has the digests of a wheel. `__pycache__` is left out: Python makes it again.
"""

import functools
import hashlib
import importlib.machinery
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import LockFileError

#: Endings of what Python can import. It prefers an extension module to a source of the same name beside it.
ENDINGS = tuple(importlib.machinery.all_suffixes())


def sha256(content: bytes) -> str:
    """The digest in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def code_digests(folder: Path) -> dict[str, str]:
    """The digest of every file in `folder` and below that Python could import, by its path inside `folder`.

    folder: may lie inside a zip file, from which Python imports as well.
    Raises LockFileError if one cannot be read, or if there are no files, as in a program packed into a single file.
    """
    try:
        found = dict(_on_disk(os.fspath(folder), "") if folder.is_dir() else _in_zip(folder))
    except OSError as error:
        where = error.filename or folder
        raise LockFileError(
            f"{where} cannot be read ({error.strerror}): a lock covers every file of code, so make it readable."
        ) from None
    return {name: found[name] for name in sorted(found)}


def tree_digest(digests: Mapping[str, str]) -> str:
    """One digest for many files: of their paths and digests, in the order of the paths."""
    return sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode("utf-8", "surrogateescape"))


def _on_disk(folder: str, before: str) -> Iterator[tuple[str, str]]:
    """Path and digest of each file. before: the path of `folder`, with a slash at its end."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if entry.name != "__pycache__" and not _leads_up(entry, folder):
                    yield from _on_disk(entry.path, f"{before}{entry.name}/")
            elif entry.name.endswith(ENDINGS):
                about = os.stat(entry.path)
                if stat.S_ISREG(about.st_mode):  # Python imports nothing else
                    seen = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
                    yield before + entry.name, _digest_of(entry.path, seen)


def _leads_up(entry: "os.DirEntry[str]", folder: str) -> bool:
    """Whether this is a link to a folder that it is in: there is no end to what is below it."""
    return entry.is_symlink() and f"{os.path.realpath(folder)}{os.sep}".startswith(
        f"{os.path.realpath(entry.path)}{os.sep}"
    )


@functools.lru_cache(maxsize=2**14)  # the second check of a process reads only what has changed since
def _digest_of(path: str, seen: tuple[int, ...]) -> str:
    """The digest of a file. seen: what the system says of the file, which differs once it has been written to."""
    with open(path, "rb") as file:
        return _digest(path, file.read())


def _in_zip(folder: Path) -> Iterator[tuple[str, str]]:
    """As `_on_disk`, of a folder inside a zip file. Raises LockFileError if there is no such file."""
    archive = next((parent for parent in folder.parents if parent.is_file()), None)
    if archive is None or not zipfile.is_zipfile(archive):
        raise LockFileError(
            f"{folder} is neither a folder nor in a zip file, so its code cannot be locked: install it with pip."
        )
    inside = folder.relative_to(archive).as_posix() + "/"
    with zipfile.ZipFile(archive) as opened:
        for name in opened.namelist():
            if name.startswith(inside) and name.endswith(ENDINGS) and "/__pycache__/" not in name:
                yield name.removeprefix(inside), _digest(name, opened.read(name))


def _digest(name: str, content: bytes) -> str:
    return sha256(content.replace(b"\r\n", b"\n") if name.endswith(".py") else content)
