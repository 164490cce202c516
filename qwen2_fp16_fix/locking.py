"""Locks: the versions and the hashes that decide a fixed model's numbers, and the differences found later."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from ._version import __version__
from .files.reading import read_bytes, read_json, to_path
from .files.writing import write_whole
from .patches.errors import LockFileError
from .patches.lock import (
    describe,
    differences,
    drift,
    file_differences,
    hash_files,
    package_files,
    strays,
)
from .patches.lock_file import FORMAT, LIMIT, read_lock
from .patches.version_map import range_for
from .results import Result

if TYPE_CHECKING:  # `register` comes by here, and must not need what only a terminal does
    from rich.text import Text

#: The lock of an exported folder.
FILE_NAME = "qwen2_fp16_fix.lock.json"


@dataclass(frozen=True, repr=False)
class LockCheck(Result):
    """The result of `check`."""

    lock: str  # the file
    folder: str | None  # an exported folder that was compared, and not the installed files
    differences: list[str]  # a sentence each
    passed: bool  # there are none

    def summary(self) -> str:
        """The first difference, and their number."""
        if self.passed:
            return f"nothing differs from {self.lock}{self._limits()}"
        noun = "difference" if len(self.differences) == 1 else "differences"
        return f"{len(self.differences)} {noun} from {self.lock}, first: {self.differences[0]}"

    def __rich__(self) -> "Text":
        """The differences, one below the other."""
        from rich.text import Text

        return Text("\n".join(self.differences) or f"Nothing differs from {self.lock}{self._limits()}.")

    def _limits(self) -> str:
        """What was not compared, as the end of a sentence."""
        return "" if self.folder is None else f"; of the fix, only the files in {self.folder} were compared"


def make_lock() -> dict[str, Any]:
    """The lock of this installation: versions, and SHA-256 of the code of this package and of what it relies on.

    Raises UnsupportedTransformersError for a transformers that is not supported, and LockFileError if a file of code
    cannot be read.
    """
    range_for(transformers.__version__)
    found = _installed()
    del found["all_files"]
    return {"format": FORMAT, **found}


def _installed() -> dict[str, Any]:
    return {"package": __version__, "package_files": package_files(), **describe()}


def lock(path: str | Path, force: bool = False) -> Path:
    """Writes the lock of this installation: the versions and hashes that decide a fixed model's numbers.

    The file is written completely or not at all. The same installation always gives the same bytes.

    Args:
        path: The file to write.
        force: Whether to overwrite a file with other content.

    Returns:
        The path of the lock.

    Raises:
        LockFileError: The file cannot be written, or has other content and `force` is False.
        UnsupportedTransformersError: The installed transformers is not supported.
    """
    path = to_path(path, LockFileError)
    content = as_text(make_lock()).encode()
    try:
        there = read_bytes(path, "another file", LockFileError, LIMIT) if path.exists() and not force else None
    except OSError as error:
        raise LockFileError(f"{path} cannot be written ({error.strerror}): name another file.") from None
    if there is None:
        write_whole(path, lambda part: part.write_bytes(content), "another file", LockFileError)
    elif there != content:
        raise LockFileError(f"{path} already exists with other content: name another file, or force to overwrite it.")
    return path


def as_text(content: Mapping[str, Any]) -> str:
    """The text of a lock. The same content is always the same text."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def check(lock: str | Path, folder: str | Path | None = None) -> LockCheck:
    """Compares this installation, or an exported folder, with a lock.

    Args:
        lock: A file made by `lock`.
        folder: An exported folder, whose files are then compared instead of the installed ones. None of its code runs.

    Returns:
        The result: `passed`, and in `differences` one sentence for each difference.

    Raises:
        LockFileError: The file is not a lock, or the folder does not exist.
    """
    found = find_differences(lock, None if folder is None else to_path(folder, LockFileError))
    return LockCheck(
        lock=str(lock), folder=None if folder is None else str(folder), differences=found, passed=not found
    )


def find_differences(lock: str | Path, folder: Path | None = None) -> list[str]:
    """The differences that `check` reports, a sentence each."""
    locked = read_lock(to_path(lock, LockFileError))
    if folder is None:
        return [*differences(locked, _installed()), *strays()]
    if not folder.is_dir():
        raise LockFileError(f"{folder} is not a folder: name one that `qwen2-fp16-fix export` has made.")
    found = describe(folder)
    del found["numerics"]  # of this package, not of the folder
    return [*differences(locked, found), *strays(folder), *_foreign_code(folder, locked["patches"])]


def changed_files(folder: Path) -> list[str]:
    """The differences of an exported folder's code from the lock in it. Installed versions are not compared."""
    locked = read_lock(folder / FILE_NAME)["patches"]
    return [*file_differences(locked, hash_files(folder)), *strays(folder), *_foreign_code(folder, locked)]


def require_lock(lock: str | Path) -> None:
    """Raises LockError if `check` finds a difference."""
    found = find_differences(lock)
    if found:
        raise drift(lock, found)


def _foreign_code(folder: Path, locked: Mapping[str, str]) -> Iterator[str]:
    """Code that the configurations in `folder` make transformers run, if the lock lacks it."""
    for path in sorted(folder.glob("*config.json")):
        try:
            content = read_json(path, "another file", LockFileError)
        except LockFileError:
            yield f"{path.name} cannot be read."
            continue
        for reference in _strings(content.get("auto_map")):
            if f"{reference.rpartition('.')[0]}.py" not in locked:
                named = reference.rpartition("--")[2]  # without the repository's owner: doctor's report is published
                yield f"{path.name} names {named}, which is not in the lock."


def _strings(tree: Any) -> Iterator[str]:
    """Every string in an auto_map. Its values are the name of a class or, for tokenizers, a list of two."""
    if isinstance(tree, str):
        yield tree
    else:
        branches = tree.values() if isinstance(tree, dict) else tree
        for branch in branches if isinstance(branches, Iterable) else ():
            yield from _strings(branch)
