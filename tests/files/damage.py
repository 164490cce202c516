"""Every way in which a key of plain data can be missing or of another type."""

import copy
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]


def damaged(data: Any, loose: frozenset[str] = frozenset({"key"})) -> Iterator[tuple[Any, str]]:
    """`data` with one key gone or one value replaced, and how a sentence names the place. Only the first of each list.

    loose: keys whose values may be anything inside.
    """
    for path in paths(data, loose):
        if isinstance(path[-1], str):
            yield changed(data, path, None), f"{path[-1]}"
        yield changed(data, path, [{"x": "y"}]), named(path)


def paths(data: Any, loose: frozenset[str]) -> Iterator[Path]:
    """The places of all values, from the top."""
    items = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    for key, value in items:
        yield (key,)
        if key not in loose:
            yield from ((key, *rest) for rest in paths(value, loose))


def changed(data: Any, path: Path, value: Any) -> Any:
    """A copy with another value at a place, or without it if that is None."""
    found = copy.deepcopy(data)
    owner = found
    for key in path[:-1]:
        owner = owner[key]
    if value is None:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return found


def named(path: Path) -> str:
    """A place as the sentences name it: rows[0].seconds."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
