"""Reads files that a user names, which may hold anything: texts, and JSON of which only one reading is possible.

What cannot be read raises the caller's own error, with one sentence.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..patches.errors import Qwen2FP16FixError

#: Bytes of a JSON file. The index of a Qwen2 has 100 KiB at most. Parsed, a text takes up to 25 times its size.
LARGEST_JSON = 8 * 2**20
#: Bytes of a text or of prompts: some million tokens. Tokenising takes a hundred times that in memory.
LARGEST_TEXT = 16 * 2**20
#: Nested brackets. The files of a checkpoint have up to ten, and Python cannot follow thousands.
DEEPEST = 64

SURROGATE = re.compile("[\ud800-\udfff]")
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def to_path(given: str | os.PathLike[str], refusal: type[Qwen2FP16FixError]) -> Path:
    """The path that a caller gave. Raises `refusal` for an empty one, which would be the current folder.

    So it does for one that is not UTF-8 or has a NUL character: what reads checkpoints opens none, and nothing can
    print it.
    """
    text = os.fspath(given)
    if not text:
        raise refusal("a path is empty: give one, or a dot for the current folder.")
    if "\0" in text or SURROGATE.search(text):
        raise refusal(f"{text!a} is a path that is not UTF-8 or has a NUL character: rename it, or give another.")
    return Path(given)


def not_a_file(mode: int) -> str | None:
    """None for a regular file, and for anything else what it is, as "a pipe". mode: `st_mode` of its stat."""
    kind = next((name for is_kind, name in KINDS if is_kind(mode)), "not a regular file")
    return None if stat.S_ISREG(mode) else kind


def read_bytes(path: Path, wanted: str, refusal: type[Qwen2FP16FixError], limit: int, name: str = "") -> bytes:
    """The content of a regular file. A pipe or a device, which may never end, is not read.

    wanted: what to name instead, as "a text file". limit: the most bytes it may have. name: what to call the file; by
    default its path.
    Raises `refusal` if it cannot be read or is too large.
    """
    name = name or str(path)
    try:
        # a pipe without a writer would keep a plain `open` waiting
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            kind = not_a_file(os.fstat(descriptor).st_mode)
            if kind is not None:
                raise refusal(f"{name} cannot be read (it is {kind}): name {wanted}.")
            with open(descriptor, "rb", closefd=False) as stream:
                found = stream.read(limit + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise refusal(f"{name} cannot be read ({error.strerror}): name {wanted}.") from None
    except ValueError:  # of Python's own check of a path
        raise refusal(f"{name!r} cannot be read (a name with a NUL character): name {wanted}.") from None
    if len(found) > limit:
        raise refusal(f"{name} is larger than {limit // 2**20} MiB, the most that is read: name {wanted}.")
    return found


def read_utf8(path: Path, wanted: str, refusal: type[Qwen2FP16FixError]) -> str:
    """The text of a file. wanted: the kind of file to name instead, as "a text file".

    Raises `refusal` if the file cannot be read, is too large or is not UTF-8.
    """
    content = read_bytes(path, wanted, refusal, LARGEST_TEXT)
    try:
        text = content.decode("utf-8-sig")  # Windows writes a byte order mark, which is not part of the text
    except UnicodeDecodeError:
        raise refusal(f"{path} is not UTF-8: convert it, or name another file.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, wanted: str, refusal: type[Qwen2FP16FixError], name: str = "") -> dict[str, Any]:
    """The object in a JSON file. wanted: what to name instead. name: what to call the file; by default its path.

    Raises `refusal` for a file that `read_bytes` refuses, for JSON that `parse_json` refuses, and for what is not an
    object.
    """
    name = name or str(path)
    content = read_bytes(path, wanted, refusal, LARGEST_JSON, name)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise refusal(f"{name} is not valid JSON (it is not UTF-8): name {wanted}.") from None
    found = parse_json(text, name, wanted, refusal)
    if not isinstance(found, dict):
        raise refusal(f"{name} is not a JSON object: name {wanted}.")
    return found


def parse_json(text: str, name: str, wanted: str, refusal: type[Qwen2FP16FixError]) -> Any:
    """JSON that every reader understands alike. name: of the file. wanted: what to name instead.

    Raises `refusal` for what is not JSON, for NaN and infinities, for numbers beyond a float's range, for a key that
    appears twice, for half a surrogate pair, which is not a character, and for more than DEEPEST nested brackets.
    """
    try:
        found = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_object
        )
        _check_tree(found)
    except RecursionError:
        problem = f"it has more than {DEEPEST} nested brackets"
    except ValueError as error:
        problem = str(error)
    else:
        return found
    raise refusal(f"{name} is not valid JSON ({problem}): name {wanted}.") from None


def _refuse_constant(text: str) -> NoReturn:
    """NaN and infinities: Python's JSON reads them, no other JSON does."""
    raise ValueError(f"{text} is not a finite number")


def _float(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"the number {shortened(text)} is beyond the range of a float")
    return found


def _int(text: str) -> int:
    """A whole number that a float can hold as well: tokenizers write 10^30. Python itself refuses 4300 digits."""
    _float(text)
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Readers differ in which value of a repeated key they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shortened(key)!r} appears twice")
    return found


def _check_tree(tree: Any) -> None:
    """Raises ValueError for half a surrogate pair in any string, and for too many nested brackets."""
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > DEEPEST + 1:
            raise ValueError(f"it has more than {DEEPEST} nested brackets")
        below: list[Any] = []
        for branch in level:
            if isinstance(branch, dict | list):
                below += _branches(branch)
            elif isinstance(branch, str) and not branch.isascii() and SURROGATE.search(branch):
                raise ValueError(f"{shortened(branch)!a} has half of a surrogate pair, which is not a character")
        level = below


def _branches(tree: dict[str, Any] | list[Any]) -> Iterator[Any]:
    """The keys and values of an object, or the members of a list."""
    if isinstance(tree, dict):
        yield from tree.keys()
        yield from tree.values()
    else:
        yield from tree


def shortened(text: str) -> str:
    """The first 40 letters of a text, for a sentence."""
    return text if len(text) <= 40 else f"{text[:37]}..."
