"""Reads back a result of `verify`, or the JSON that `verify --json` has printed, for a report or a model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from ..files.reading import read_json, to_path
from ..files.schema import problem
from ..patches.errors import Qwen2FP16FixError
from ..results import Result

WANTED = "a file with the JSON that `qwen2-fp16-fix verify PATH --json` prints"


class SavedVersions(TypedDict):
    """What is read of the versions."""

    transformers: str
    torch: str


class SavedSettings(TypedDict):
    """What is read of the settings."""

    tokens: int
    window: int
    device: str


class SavedRow(TypedDict):
    """What is read of a row."""

    name: str
    dtype: str
    fixed: bool
    finite: bool
    perplexity: float | None
    drift: float | None
    kl_mean: float | None
    kl_max: float | None
    top1_agreement: float | None
    largest_logit_difference: float | None
    first_overflow: str | None


class Saved(TypedDict):
    """What is read of a verification. It has more."""

    versions: SavedVersions
    checkpoint: str
    settings: SavedSettings
    rows: list[SavedRow]
    verdict: str


def read_saved(given: Result | Mapping[str, Any] | str | Path, refusal: type[Qwen2FP16FixError]) -> dict[str, Any]:
    """The verification as plain data. given: the result, the same as plain data, or a file with it as JSON.

    Raises `refusal` for a file that cannot be read, and for data that is not as `Saved` says.
    """
    if isinstance(given, Result | Mapping):
        name = "the verification"
        found = given.to_dict() if isinstance(given, Result) else dict(given)
    else:
        path = to_path(given, refusal)
        name, found = str(path), read_json(path, WANTED, refusal)
    wrong = problem(found, Saved) or ("it has no rows" if not found["rows"] else None)
    if wrong is not None:
        raise refusal(f"{name} is not a result of verify ({wrong}): name {WANTED}.")
    return found
