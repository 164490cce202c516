"""What the environment says: whether the fix is switched off, and which lock must hold.

A lock lists everything that decides a fixed model's numbers. This file says how an environment differs from one.

With QWEN2_FP16_FIX_LOCK=FILE in the environment nothing is fixed and no fixed model is built if anything differs from
FILE. That guards against accidents and drift, not against an attacker: someone who can edit the files beside this
one can edit this one. Against an attacker pin the commit, or check from outside (`qwen2-fp16-fix check`).
"""

import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from .errors import LockError
from .loaded_code import other_code
from .lock_file import read_lock
from .source_files import code_digests, sha256, tree_digest
from .upstream_code import FOLDER, entered_modules, file_of, unlike_record, upstream_digests
from .version_map import NUMERICS

VARIABLE = "QWEN2_FP16_FIX_LOCK"
SWITCH = "QWEN2_FP16_FIX"
HERE = Path(__file__).parent

#: Whether these files are remote code, which came with a model: the package around them may not be there at all.
IS_REMOTE = __name__.startswith("transformers_modules.")
#: The package whose code this is.
OWN = str(__package__) if IS_REMOTE else str(__package__).rpartition(".")[0]

SHOWN = 3  # differences in an error; `check` lists all of them
LONGEST = 250  # characters of each; after another release one of them names a hundred classes


def is_switched_off() -> bool:
    """Whether the environment says QWEN2_FP16_FIX=0, which leaves every model stock."""
    return os.environ.get(SWITCH, "").strip() == "0"


def check_when_asked() -> None:
    """Raises LockError if anything differs from the lock that the environment names, LockFileError if it is not one."""
    path = os.environ.get(VARIABLE, "").strip()
    if path:
        check_lock(path)


@functools.cache  # one check a process for each path; errors are not cached
def check_lock(path: str) -> None:
    """Raises LockError if the code of this fix, transformers or torch differ from the lock at `path`.

    As remote code, of this fix only the files beside this one are compared. The error says so.
    """
    lock, here = read_lock(path), describe()
    if IS_REMOTE:
        here["patches"] = _as_copied(here["patches"], lock["patches"])
    else:
        here["package_files"] = package_files()
    found = [*differences(lock, here), *(() if IS_REMOTE else strays())]
    if found:
        raise drift(path, found)


def _as_copied(files: Mapping[str, str], locked: Mapping[str, str]) -> dict[str, str]:
    """`files` as they would be without the changes that transformers makes in its cache of remote code.

    It adds an empty `__init__.py` and leaves out files that the entry file does not import.
    """
    changed = {name: digest for name, digest in files.items() if (name, digest) != ("__init__.py", sha256(b""))}
    return {**locked, **changed}


def drift(path: str | Path, found: Sequence[str]) -> LockError:
    """The error for these differences from the lock at `path`: the first ones, and how many there are."""
    first = [each if len(each) <= LONGEST else f"{each[:LONGEST]}…" for each in found[:SHOWN]]
    left = len(found) - SHOWN
    more = f" And {left} more: `qwen2-fp16-fix check {path}` lists all." if left > 0 else ""
    limits = " Of the fix, only the files that came with the model were compared." if IS_REMOTE else ""
    return LockError(
        f"this is not what {path} locks: {' '.join(first)}{more}{limits} Install what is locked, or make a new lock."
    )


def describe(folder: Path | None = None) -> dict[str, Any]:
    """What a lock holds, but for the package: on the patches in `folder`, and on the transformers and torch that run.

    folder: by default the one with this file; then the functions in it are compared with their source as well.
    `all_files`, the digest of every file of transformers, is not part of a lock.
    """
    upstream = entered_modules()
    all_files = code_digests(FOLDER)
    own = {name: each for name, each in list(sys.modules.items()) if f"{name}.".startswith(f"{OWN}.")}
    return {
        "numerics": NUMERICS,
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
        "patches": hash_files(folder or HERE),
        "upstream": upstream_digests(upstream),
        "upstream_files": {name: all_files[name] for name in map(file_of, upstream.values()) if name in all_files},
        "upstream_tree": tree_digest(all_files),
        "other_code": other_code(upstream if folder else upstream | own),
        "all_files": all_files,
    }


def hash_files(folder: Path) -> dict[str, str]:
    """The digest of every file in `folder` that Python could import, by its name."""
    return {name: digest for name, digest in code_digests(folder).items() if "/" not in name}


def strays(folder: Path | None = None) -> Iterator[str]:
    """Importable files in folders inside `folder`. A lock lists none, and Python prefers a folder to a file."""
    for name in code_digests(folder or HERE):
        if "/" in name:
            yield f"{name} is not in the lock."


def package_files() -> dict[str, str]:
    """The digest of every file of the installed package that Python could import, without those of `patches/`."""
    return {
        f"{OWN}/{name}": digest
        for name, digest in code_digests(HERE.parent).items()
        if not name.startswith(f"{HERE.name}/")
    }


def differences(lock: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that is not as locked. Keys that `found` lacks are skipped."""
    sentences = []
    for name, title in (("package", "qwen2-fp16-fix"), ("transformers", "transformers"), ("torch", "torch")):
        if name in found and found[name] != lock[name]:
            sentences.append(f"{title} {found[name]} is installed, {lock[name]} is locked.")
    if "numerics" in found and found["numerics"] != lock["numerics"]:
        sentences.append(f"The numerics are version {found['numerics']}, {lock['numerics']} is locked.")
    sentences += file_differences(lock["patches"], found["patches"])
    if "package_files" in found:
        sentences += file_differences(lock["package_files"], found["package_files"])
    return [*sentences, *_upstream_differences(lock, found), *_other_code(lock["other_code"], found["other_code"])]


def file_differences(locked: Mapping[str, str], found: Mapping[str, str], of: str = "") -> Iterable[str]:
    """A sentence for each file that differs from the lock, is missing, or is not in the lock. of: whose files."""
    for name in sorted({*locked, *found}):
        if name not in found:
            yield f"{name}{of} is locked but missing."
        elif name not in locked:
            yield f"{name}{of} is not in the lock."
        elif found[name] != locked[name]:
            yield f"{name}{of} is not the file that was locked."


def _upstream_differences(lock: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for another transformers release; for the locked one, a sentence for each thing that differs."""
    locked, there = lock["upstream"], found["upstream"]
    changed = [name for name in locked if there.get(name) != locked[name]]
    if lock["transformers"] != found["transformers"]:
        listed = f"these differ: {', '.join(changed)}" if changed else "none differs"
        yield f"Of the {len(locked)} classes and functions of transformers that matter here, {listed}."
        return
    for name in changed:
        yield f"{name} of transformers {'is not the code that was locked' if name in there else 'is not there'}."
    named = lock["upstream_files"]
    beside = {_importable_as(name) for name in named}
    near = {name: digest for name, digest in found["all_files"].items() if _importable_as(name) in beside}
    sentences = list(file_differences(named, near, " of transformers"))
    yield from sentences
    if lock["upstream_tree"] != found["upstream_tree"]:
        yield from _other_files(found["all_files"], {*named, *near}, bool(sentences))


def _importable_as(name: str) -> str:
    """The module that a file would be imported as, as a path: an extension or a folder may hide a source."""
    return name.partition(".")[0].removesuffix("/__init__")


def _other_files(files: Mapping[str, str], named: set[str], is_explained: bool) -> Iterator[str]:
    """A sentence on changed files that a lock does not list, where pip can name them or where nothing else differs."""
    others = [name for name in unlike_record(files) if name not in named]
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    if others:
        yield f"Other files of transformers have changed since they were installed: {', '.join(others[:SHOWN])}{more}."
    elif not is_explained:
        yield "A file of transformers is not the one that was locked, and pip's record does not say which."


def _other_code(locked: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each function that runs other code than its source, unless the lock says the same of it."""
    for place, whose in found.items():
        if locked.get(place) != whose:
            yield f"{place} does not run the code in its source file, but {whose}."
