"""Reads a lock. The file may hold anything: what is not a lock is refused in a sentence, fast and in little memory."""

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import LockFileError

FORMAT = 2
LIMIT = 2**22  # bytes; a lock has some 50,000
LONGEST = 300  # characters of a version, or of what is said of a function
DIGEST = re.compile(r"(code )?[0-9a-f]{64}")


def is_text(value: Any) -> bool:
    """Whether this is a text that fits into a sentence."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST and value.isprintable()


def is_number(value: Any) -> bool:
    """Whether this is a number that counts versions."""
    return type(value) is int and 0 <= value < 10**6


def is_digest(value: Any) -> bool:
    """Whether this is a digest as a lock has them: 64 hexadecimal digits."""
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


#: What a lock must hold to be one: how a value is checked, and what it should be.
SINGLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "package": (is_text, "a version"),
    "numerics": (is_number, "a number"),
    "transformers": (is_text, "a version"),
    "torch": (is_text, "a version"),
    "upstream_tree": (is_digest, "a digest"),
}
#: The same for what has a value for each name; whether there has to be any.
TABLES: dict[str, tuple[Callable[[Any], bool], str, bool]] = {
    "patches": (is_digest, "a digest", True),
    "package_files": (is_digest, "a digest", True),
    "upstream": (is_digest, "a digest", True),
    "upstream_files": (is_digest, "a digest", True),
    "other_code": (is_text, "a short text", False),
}


def read_lock(path: str | Path) -> dict[str, Any]:
    """The lock at `path`. Raises LockFileError for anything else."""
    try:
        found = json.loads(_read(path), object_pairs_hook=_once, parse_constant=_refuse)
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair could not be printed
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from None
    except (ValueError, RecursionError):
        raise _unreadable(path, "it is not valid JSON") from None
    if not isinstance(found, dict) or not is_number(found.get("format")):
        raise LockFileError(f"{path} is not a lock: make one with `qwen2-fp16-fix lock`.")
    if found["format"] != FORMAT:
        raise LockFileError(
            f"{path} is a lock of format {found['format']}, and this version reads {FORMAT}: make a new lock, or "
            "install the version that made this one."
        )
    _check(path, found)
    return found


def _read(path: str | Path) -> str:
    """The text of a file. Raises OSError or ValueError if it is not a regular file, too large or not UTF-8."""
    # Opening a pipe would wait for somebody to write into it. Windows has neither the flag nor such pipes.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "it is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(LIMIT + 1)
    finally:
        os.close(descriptor)
    if len(content) > LIMIT:
        raise OSError(0, f"it has more than {LIMIT >> 20} MiB")
    return content.decode("utf-8")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it gives a key twice: one reader would take the first, another the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is given twice")
    return made


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _unreadable(path: str | Path, reason: str) -> LockFileError:
    return LockFileError(f"{path} cannot be read as a lock ({reason}): make one with `qwen2-fp16-fix lock`.")


def _check(path: str | Path, found: dict[str, Any]) -> None:
    """Raises LockFileError, which names the key, unless everything a lock has is there and of its kind."""
    for field in (*SINGLE, *TABLES):
        if field not in found:
            raise LockFileError(f"{path} is a lock without {field}: make a new one with `qwen2-fp16-fix lock`.")
    for field, (is_good, wanted) in SINGLE.items():
        if not is_good(found[field]):
            raise _wrong(path, field, wanted)
    for field, (is_good, wanted, needed) in TABLES.items():
        table = found[field]
        if not isinstance(table, dict) or (needed and not table):
            raise _wrong(path, field, f"{wanted} for each name")
        for name, value in table.items():
            if not is_text(name) or not is_good(value):
                raise _wrong(path, f"{field}[{name[:LONGEST]!r}]", wanted)


def _wrong(path: str | Path, where: str, wanted: str) -> LockFileError:
    return LockFileError(f"{path} is a lock whose {where} is not {wanted}: make a new one with `qwen2-fp16-fix lock`.")
