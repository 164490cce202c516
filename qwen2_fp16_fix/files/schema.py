"""Whether data from a file has the form of a dataclass or a TypedDict, and the place where it does not."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from .reading import shortened

#: Types without parts, what they are called, and what may stand for them. A bool is not a number here.
PLAIN: dict[Any, tuple[str, tuple[type, ...]]] = {
    str: ("a text", (str,)),
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a finite number", (int, float)),
    type(None): ("null", (type(None),)),
}


def problem(data: Any, form: Any, place: str = "it") -> str | None:
    """The first thing in `data` that is not as `form` says, as "rows[2].seconds is 'x', not a finite number".

    form: a dataclass, a TypedDict, a plain type, a union of these, or a list, tuple or dict of them. Keys that a form
    does not name are allowed: a later version may write more. place: what to call `data` itself.
    """
    return next(_problems(data, form, "", place), None)


def _problems(data: Any, form: Any, path: str, place: str) -> Iterator[str]:
    origin, parts = typing.get_origin(form), typing.get_args(form)
    called = path or place
    if form is Any:
        return
    if origin in (typing.Union, types.UnionType):
        if all(problem(data, part) for part in parts):
            yield f"{called} is {_shown(data)}, not {' or '.join(map(_name, parts))}"
    elif origin in (list, tuple):
        yield from _items(data, parts[0], called)
    elif origin is dict:
        yield from _not_a(dict, data, called) or _values(data, dict.fromkeys(data, parts[1]), path, place)
    elif form in PLAIN:
        if not _is_plain(data, form):
            yield f"{called} is {_shown(data)}, not {_name(form)}"
    else:
        yield from _not_a(dict, data, called) or _values(data, _fields(form), path, place)


def _not_a(kind: type, data: Any, called: str) -> list[str]:
    is_kind = isinstance(data, Mapping if kind is dict else list | tuple)
    return [] if is_kind else [f"{called} is {_shown(data)}, not {'an object' if kind is dict else 'a list'}"]


def _items(data: Any, form: Any, called: str) -> Iterator[str]:
    yield from _not_a(list, data, called) or (
        found for number, each in enumerate(data) for found in _problems(each, form, f"{called}[{number}]", "")
    )


def _values(data: Mapping[str, Any], fields: Mapping[str, Any], path: str, place: str) -> Iterator[str]:
    for key, form in fields.items():
        if key not in data:
            yield f"{path or place} lacks {key}"
        else:
            yield from _problems(data[key], form, f"{path}.{key}" if path else key, "")


@functools.cache
def _fields(form: type) -> dict[str, Any]:
    """The fields of a dataclass, or the keys of a TypedDict, with their types."""
    hints = typing.get_type_hints(form)
    return (
        {field.name: hints[field.name] for field in dataclasses.fields(form)}
        if dataclasses.is_dataclass(form)
        else hints
    )


def _is_plain(data: Any, form: Any) -> bool:
    kinds = PLAIN[form][1]
    return isinstance(data, kinds) and (bool in kinds or not isinstance(data, bool)) and _is_finite(data)


def _is_finite(data: Any) -> bool:
    return not isinstance(data, float) or math.isfinite(data)


def _name(form: Any) -> str:
    return PLAIN[form][0] if form in PLAIN else "an object"


def _shown(data: Any) -> str:
    if isinstance(data, dict | list | tuple):
        return "an object" if isinstance(data, dict) else "a list"
    return shortened("null" if data is None else ascii(data))
