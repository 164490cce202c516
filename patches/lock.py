"""What the environment says: whether the fix is switched off, and which lock must hold.

A lock lists everything that decides a fixed model's numbers. This file reads one and says how an environment differs.

With QWEN2_FP16_FIX_LOCK=FILE in the environment nothing is fixed and no fixed model is built if anything differs from
FILE. That guards against accidents and drift, not against an attacker: whoever can edit the files beside this one can
edit this one. Against an attacker pin the commit, or check from outside (`qwen2-fp16-fix check`).
"""

import functools
import hashlib
import importlib.machinery
import inspect
import json
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from .errors import LockError, LockFileError
from .version_map import NUMERICS

FORMAT = 1
VARIABLE = "QWEN2_FP16_FIX_LOCK"
SWITCH = "QWEN2_FP16_FIX"
HERE = Path(__file__).parent

#: What a lock must hold to be one.
FIELDS: dict[str, type] = {
    "package": str,
    "numerics": int,
    "transformers": str,
    "torch": str,
    "patches": dict,
    "upstream": dict,
}

#: transformers' tables of functions that its Qwen2 uses: attention implementations and RoPE variants.
TABLES = ("ALL_ATTENTION_FUNCTIONS", "ROPE_INIT_FUNCTIONS")


def is_switched_off() -> bool:
    """Whether the environment says QWEN2_FP16_FIX=0, which leaves every model stock."""
    return os.environ.get(SWITCH, "").strip() == "0"


def check_when_asked() -> None:
    """Raises LockError if the environment names a lock and anything differs from it, LockFileError if it is no lock."""
    path = os.environ.get(VARIABLE, "").strip()
    if path:
        check_lock(path)


@functools.cache  # one check a process for each path; errors are not cached
def check_lock(path: str) -> None:
    """Raises LockError if the files beside this one, transformers or torch differ from the lock at `path`."""
    lock, here = read_lock(path), describe()
    if __name__.startswith("transformers_modules."):
        here["patches"] = _as_copied(here["patches"], lock["patches"])
    found = differences(lock, here)
    if found:
        raise drift(path, found)


def _as_copied(files: Mapping[str, str], locked: Mapping[str, str]) -> dict[str, str]:
    """`files` as they would be without the changes that transformers makes in its cache of remote code.

    It adds an empty `__init__.py` and leaves out files that the entry file does not import.
    """
    changed = {name: digest for name, digest in files.items() if (name, digest) != ("__init__.py", sha256(b""))}
    return {**locked, **changed}


def drift(path: str | Path, found: Sequence[str]) -> LockError:
    """The error for these differences from the lock at `path`."""
    return LockError(f"this is not what {path} locks: {' '.join(found)} Install what is locked, or lock anew.")


def describe(folder: Path = HERE) -> dict[str, Any]:
    """The part of a lock on patches, by default those beside this file, and on the transformers and torch that run."""
    return {
        "numerics": NUMERICS,
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
        "patches": hash_files(folder),
        "upstream": upstream_digests(),
    }


def read_lock(path: str | Path) -> dict[str, Any]:
    """The lock at `path`. Raises LockFileError for anything else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise LockFileError(
            f"{path} cannot be read as a lock ({reason}): make one with `qwen2-fp16-fix lock`."
        ) from None
    if not isinstance(found, dict) or "format" not in found:
        raise LockFileError(f"{path} is no lock: make one with `qwen2-fp16-fix lock`.")
    if found["format"] != FORMAT:
        raise LockFileError(
            f"{path} is a lock of format {found['format']!r}, and this version reads {FORMAT}: lock anew, or install "
            "the version that made it."
        )
    broken = [name for name, kind in FIELDS.items() if not isinstance(found.get(name), kind) or not found[name]]
    if broken:
        raise LockFileError(f"{path} is a lock without {', '.join(broken)}: make it anew with `qwen2-fp16-fix lock`.")
    return found


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in `folder` that Python could import, by its name."""
    return {path.name: sha256(path.read_bytes()) for path in sorted(folder.iterdir()) if is_importable(path)}


def is_importable(path: Path) -> bool:
    """Whether Python could import this file. Extension modules count: Python prefers them to a source beside them."""
    return path.name.endswith(tuple(importlib.machinery.all_suffixes())) and path.is_file()


def sha256(content: bytes) -> str:
    """The digest in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def upstream_digests() -> dict[str, str]:
    """A digest of each class and function of transformers that its Qwen2 module defines, imports or has in a table.

    The fix overrides fewer, but masks, caches and generation decide the numbers too.
    """
    try:
        from transformers.models.qwen2 import modeling_qwen2 as stock
    except ImportError:  # a release before Qwen2
        return {}
    named = dict(vars(stock))
    for table in TABLES:
        named |= {f"{table}[{key}]": value for key, value in dict(getattr(stock, table, {})).items()}
    return {name: source_digest(own) for name in sorted(named) if (own := upstream_code(named[name])) is not None}


def upstream_code(thing: Any) -> Any:
    """A class or function of transformers, or the stock class of a drop-in class; None for anything else."""
    for candidate in getattr(thing, "__mro__", (thing,)):
        is_code = isinstance(candidate, (type, types.FunctionType))
        if is_code and str(candidate.__module__).startswith("transformers.") and candidate.__name__ == thing.__name__:
            return candidate
    return None


@functools.cache  # it searches source files; a class or function does not change once it is imported
def source_digest(thing: Any) -> str:
    """SHA-256 of the source of a class or function, or of its compiled code if the source is not installed."""
    try:
        return sha256(inspect.getsource(thing).encode())
    except (OSError, TypeError):
        return "code " + sha256(_compiled(thing).encode())


def _compiled(thing: Any) -> str:
    """A class, function, code object or constant as text; the text is the same in each process of a Python version."""
    if isinstance(thing, type):
        return repr([(name, _compiled(f)) for name, f in sorted(vars(thing).items()) if inspect.isfunction(f)])
    if isinstance(thing, types.FunctionType):
        return _compiled(inspect.unwrap(thing).__code__)
    if isinstance(thing, types.CodeType):
        return repr((thing.co_code, thing.co_names, thing.co_varnames, [_compiled(c) for c in thing.co_consts]))
    return repr(sorted(map(repr, thing))) if isinstance(thing, frozenset) else repr(thing)


def differences(lock: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that is not as locked. Keys that `found` lacks are skipped."""
    sentences = []
    for name, title in (("package", "qwen2-fp16-fix"), ("transformers", "transformers"), ("torch", "torch")):
        if name in found and found[name] != lock[name]:
            sentences.append(f"{title} {found[name]} is installed, {lock[name]} is locked.")
    if "numerics" in found and found["numerics"] != lock["numerics"]:
        sentences.append(f"The numerics are version {found['numerics']}, {lock['numerics']} is locked.")
    return [*sentences, *file_differences(lock["patches"], found["patches"]), *_upstream_differences(lock, found)]


def file_differences(locked: Mapping[str, str], found: Mapping[str, str]) -> Iterable[str]:
    """A sentence for each file that differs from the lock, is missing, or is not in the lock."""
    for name in sorted({*locked, *found}):
        if name not in found:
            yield f"{name} is locked and missing."
        elif name not in locked:
            yield f"{name} is not in the lock."
        elif found[name] != locked[name]:
            yield f"{name} is not the file that was locked."


def _upstream_differences(lock: Mapping[str, Any], found: Mapping[str, Any]) -> Iterable[str]:
    """One sentence for another transformers release; for the locked one, a sentence for each class that differs."""
    locked, there = lock["upstream"], found["upstream"]
    changed = [name for name in locked if there.get(name) != locked[name]]
    if lock["transformers"] != found["transformers"]:
        listed = f"these differ: {', '.join(changed)}" if changed else "none differs"
        yield f"Of the {len(locked)} classes and functions of transformers that matter here, {listed}."
        return
    for name in changed:
        yield f"{name} of transformers {'is not the code that was locked' if name in there else 'is not there'}."
