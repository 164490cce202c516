"""Reads back a result of `verify`, or the JSON that `verify --json` has printed, for a report or a model card."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..results import Result


def read_saved(
    given: Result | Mapping[str, Any] | str | Path,
    *,
    fields: Collection[str] = (),
    settings: Collection[str] = (),
    row: Collection[str] = (),
) -> dict[str, Any]:
    """The verification as plain data. given: the result, the same as plain data, or a file with it as JSON.

    fields, settings, row: the keys that must be there, at the top, among the settings and in every row.
    Raises OSError or ValueError for a file that is no readable JSON, LookupError if a key or all rows are missing.
    """
    found: Any = given.to_dict() if isinstance(given, Result) else given
    if isinstance(found, str | Path):
        found = json.loads(Path(found).read_text(encoding="utf-8"))
    try:
        whole = {*fields} <= {*found} and {*settings} <= {*found["settings"]}
        whole = whole and bool(found["rows"]) and all({*row} <= {*each} for each in found["rows"])
    except (TypeError, KeyError):
        whole = False
    if not whole:
        raise LookupError("not what verify returns")
    return dict(found)
