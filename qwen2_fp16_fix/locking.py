"""Locks what decides a fixed model's numbers in a file, and says what has drifted from it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers

from ._version import __version__
from .files import write_whole
from .patches.errors import LockFileError
from .patches.lock import (
    FORMAT,
    HERE,
    describe,
    differences,
    drift,
    file_differences,
    hash_files,
    is_importable,
    read_lock,
)
from .patches.version_map import range_for

#: The lock of an exported folder.
FILE_NAME = "qwen2_fp16_fix.lock.json"


def make_lock() -> dict[str, Any]:
    """What runs here, as data: versions, and SHA-256 of every patch file and of what they rely on in transformers.

    Raises UnsupportedTransformersError where there is nothing to lock.
    """
    range_for(transformers.__version__)
    return {"format": FORMAT, **_installed()}


def _installed() -> dict[str, Any]:
    return {"package": __version__, **describe()}


def lock(path: str | Path, force: bool = False) -> Path:
    """Writes the lock of what runs here to `path`, whole or not at all.

    Raises LockFileError where it cannot be written, or where `path` holds anything else and `force` is not given, and
    UnsupportedTransformersError where there is nothing to lock.
    """
    path, content = Path(path), as_text(make_lock()).encode()
    try:
        there = path.read_bytes() if path.exists() and not force else None
    except OSError as error:
        raise LockFileError(f"{path} cannot be written ({error.strerror}): name another file.") from None
    if there is None:
        write_whole(path, lambda part: part.write_bytes(content), "another file", LockFileError)
    elif there != content:
        raise LockFileError(f"{path} is there already and says something else: use another name, or force it.")
    return path


def as_text(content: Mapping[str, Any]) -> str:
    """A lock as it is written: the same content is the same text."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def check(lock: str | Path, folder: str | Path | None = None) -> list[str]:
    """What differs here from the lock in the file `lock`, a sentence each; empty where nothing does.

    folder: an exported folder, whose files are then compared in place of the installed ones. Nothing in it is run.
    Sources are compared, not the bytecode that Python keeps of them. Raises LockFileError for what is no lock, and for
    a folder that is not there.
    """
    locked = read_lock(lock)
    if folder is None:
        return [*differences(locked, _installed()), *_strays(HERE)]
    folder = Path(folder)
    if not folder.is_dir():
        raise LockFileError(f"{folder} is no folder: name one that `qwen2-fp16-fix export` has made.")
    found = describe(folder)
    del found["numerics"]  # of this package, not of the folder
    return [*differences(locked, found), *_strays(folder), *_foreign_code(folder, locked["patches"])]


def changed_files(folder: Path) -> list[str]:
    """What of an exported folder's code differs from the lock that it carries. Where it runs does not matter here."""
    locked = read_lock(folder / FILE_NAME)["patches"]
    return [*file_differences(locked, hash_files(folder)), *_strays(folder), *_foreign_code(folder, locked)]


def refuse_drift(lock: str | Path) -> None:
    """Raises LockError where `check` finds a difference."""
    found = check(lock)
    if found:
        raise drift(lock, found)


def _strays(folder: Path) -> Iterator[str]:
    """What Python could import from folders inside `folder`: no lock has any, and a folder goes before a file."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if len(inside.parts) > 1 and "__pycache__" not in inside.parts and is_importable(path):
            yield f"{inside.as_posix()} is not in the lock."


def _foreign_code(folder: Path, locked: Mapping[str, str]) -> Iterator[str]:
    """Code beside the locked files that the configurations in `folder` would have transformers run."""
    for path in sorted(folder.glob("*config.json")):
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError):
            yield f"{path.name} cannot be read."
            continue
        for reference in _strings(content.get("auto_map") if isinstance(content, dict) else None):
            if f"{reference.rpartition('.')[0]}.py" not in locked:
                named = reference.rpartition("--")[2]  # not whose repository: doctor's report goes into public issues
                yield f"{path.name} names {named}, which is not in the lock."


def _strings(tree: Any) -> Iterator[str]:
    """Every string in an auto_map: a class for an Auto class, or a list of two for tokenizers."""
    if isinstance(tree, str):
        yield tree
    else:
        for branch in tree.values() if isinstance(tree, dict) else tree or ():
            yield from _strings(branch)
