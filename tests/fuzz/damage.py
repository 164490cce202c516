"""Odd values and odd text: what a JSON document can become."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Text of JSON values that a document is given in place of its own. Some are no JSON; Python reads NaN all the same.
NUMBERS = ("0", "1", "2", "-1", "-0", "0.0", "-0.0", "0.5", "1.5", "-3.7", "3", "7", "64", "100", "1000000", "10000000")
EXTREMES = ("1e308", "-1e308", "1e309", "1e-60", "1e-320", "1e-400", "5e-324", "65504", "65520", "3.5e38", "1e39")
INTEGERS = ("2147483648", "-2147483649", "9223372036854775807", "9223372036854775808", "18446744073709551616")
HUGE = ("1" + "0" * 310, "-1" + "0" * 310, "9" * 4400, "1" + "0" * 310 + ".5", "1" + "0" * 5000)
NO_NUMBERS = ("NaN", "Infinity", "-Infinity")
STRINGS = (
    '""',
    '"0"',
    '"2"',
    '"x"',
    '"auto"',
    '"nan"',
    '"inf"',
    '"\\u0000"',
    '"\\ud800"',
    '"a\\udfffb"',
    '"../../etc"',
)
STRINGS += ('"' + "x" * 5000 + '"', '"\\n\\n"', '"[/INST] [bold]"', '"{}"', '"中文"', '"\\ud83d\\ude00"', '"/dev/zero"')
CONSTANTS = ("null", "true", "false")
TREES = (
    "[]",
    "{}",
    "[null]",
    "[1]",
    "[0, 1, 2]",
    '["x"]',
    '{"x": 1}',
    '{"": null}',
    "[[]]",
    "[{}]",
    '{"a": {"b": []}}',
)
TREES += ('["\\ud800"]', '{"\\ud800": 1}', '[1, "x", null, true]', "[" + "0, " * 3000 + "0]", '{"type": "yarn"}')
DEEP = ("[" * 100_000 + "]" * 100_000, '{"x":' * 100_000 + "1" + "}" * 100_000, "[" * 990 + "]" * 990, "[" * 100_000)
GROUPS = (
    NUMBERS,
    NUMBERS,
    EXTREMES,
    INTEGERS,
    HUGE,
    NO_NUMBERS,
    STRINGS,
    STRINGS,
    CONSTANTS,
    CONSTANTS,
    TREES,
    TREES,
    DEEP,
)


class Raw(str):
    """Text that stands in a document as it is, be it JSON or not."""


def odd_value(chosen: random.Random) -> Raw:
    """The text of a value of some group; each group is as likely."""
    return Raw(chosen.choice(chosen.choice(GROUPS)))


def dumps(tree: Any) -> str:
    """The JSON of a tree, with its Raw values as they are."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{dumps(key)}: {dumps(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(dumps, tree)) + "]"
    return json.dumps(tree)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in a tree of dicts and lists: the dict or list, and the key."""
    found: list[tuple[Any, Any]] = []
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            found += [(tree, key), *places(tree[key])]
    return found


def change_tree(tree: Any, chosen: random.Random) -> Any:
    """The tree with one to three places changed: another value, none, a neighbour's, or a key of another name."""
    for _ in range(chosen.choice((1, 1, 1, 2, 3))):
        where = places(tree)
        if not where:
            return odd_value(chosen)
        node, key = chosen.choice(where)
        how = chosen.randrange(10)
        if how < 6:
            node[key] = odd_value(chosen)
        elif how == 6:
            del node[key]
        elif how == 7:
            other, name = chosen.choice(where)
            node[key] = json.loads(json.dumps(other[name])) if _is_plain(other[name]) else odd_value(chosen)
        elif isinstance(node, dict):
            node[odd_key(chosen, str(key))] = node.pop(key) if how == 8 else odd_value(chosen)
        else:
            node.insert(key, odd_value(chosen))
    return tree


def _is_plain(tree: Any) -> bool:
    return not isinstance(tree, Raw) and not any(isinstance(node[key], Raw) for node, key in places(tree))


def odd_key(chosen: random.Random, key: str) -> Any:
    """Another name for a key: nearly the same, none, or no Unicode."""
    return chosen.choice(
        (key.upper(), key + " ", "", Raw('"\\ud800"'), "x" * 3000, Raw(json.dumps(key)), "\x00", key[::-1])
    )


# Text that is no JSON, or hardly

TEXTS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    lambda data, chosen: data[: chosen.randrange(len(data) + 1)],
    lambda data, chosen: _flip(data, chosen, 1),
    lambda data, chosen: _flip(data, chosen, 20),
    lambda data, chosen: b"",
    lambda data, chosen: b"\xef\xbb\xbf" + data,
    lambda data, chosen: data.decode("utf-8", "replace").encode("utf-16"),
    lambda data, chosen: data + chosen.choice((b"x", b"\x00", b"{}", b"\n\n", b"]", data)),
    lambda data, chosen: chosen.choice((b" ", b"\x00", b"\xff", b"//\n", b"'")) + data,
    lambda data, chosen: bytes(chosen.randrange(256) for _ in range(chosen.choice((1, 10, 1000)))),
    lambda data, chosen: chosen.choice(TOPS),
    lambda data, chosen: data.replace(b":", b"=", 1),
    lambda data, chosen: data.replace(b'"', b"'"),
    lambda data, chosen: data.replace(b",", b",,", 1),
    lambda data, chosen: data + b" " * 3_000_000,
    lambda data, chosen: data.replace(b"{", b'{"x": ' + chosen.choice(DEEP).encode() + b", ", 1),
    lambda data, chosen: data.replace(b"{", b'{"\xed\xa0\x80": 1, ', 1),
)
TOPS = tuple(text.encode() for group in GROUPS for text in group)


def _flip(data: bytes, chosen: random.Random, count: int) -> bytes:
    """The data with some bytes changed."""
    found = bytearray(data)
    for _ in range(count if found else 0):
        found[chosen.randrange(len(found))] = chosen.randrange(256)
    return bytes(found)


def change_text(data: bytes, chosen: random.Random) -> bytes:
    """The text of a document, damaged."""
    return chosen.choice(TEXTS)(data, chosen)


# What is no file

NO_FILES = ("fifo", "folder", "loop", "dangling", "sparse", "through")


def change_file(path: Path, chosen: random.Random, devices: bool = True) -> str:
    """Puts something else in the place of a file, and says what. devices: that may be a link to a device."""
    if path.is_symlink() or path.exists():
        path.unlink()
    how = chosen.choice(NO_FILES + ("zero", "null", "tty", "full") * devices)
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "sparse":
        with path.open("wb") as file:
            file.truncate(3 * 2**29)  # less than a process may map
    else:
        targets = {"loop": path.name, "dangling": "nowhere.json", "through": f"{path.name}/x", "full": "/dev/full"}
        path.symlink_to(targets.get(how, f"/dev/{how}"))
    return how
