"""What verify has returned is read back: a result, plain data or a file, or refused where a key is missing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen2_fp16_fix.results import Result
from qwen2_fp16_fix.verification.saved import read_saved

PLAIN: dict[str, Any] = {
    "settings": {"window": 4},
    "rows": [{"name": "stock"}, {"name": "fixed"}],
    "verdict": "Verified",
}
WANTED: dict[str, Any] = {"fields": ("verdict",), "settings": ("window",), "row": ("name",)}


@dataclass(frozen=True, repr=False)
class Found(Result):
    settings: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    verdict: str


def test_a_result_plain_data_and_a_file_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    file.write_text(json.dumps(PLAIN))
    result = Found(PLAIN["settings"], tuple(PLAIN["rows"]), PLAIN["verdict"])
    assert all(read_saved(given, **WANTED) == PLAIN for given in (result, PLAIN, file, str(file)))


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"rows": [{"name": "stock"}, {}]},
        {"rows": [1]},
        {"settings": {}},
        {"settings": None},
        {"rows": None},
    ],
)
def test_what_lacks_something_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LookupError):
        read_saved(PLAIN | change, **WANTED)


@pytest.mark.parametrize("text", ["[]", "1", '"text"', "null", "{}"])
def test_other_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(LookupError):
        read_saved(tmp_path / "x", **WANTED)


def test_a_file_that_is_no_json_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="Expecting value"):
        read_saved(tmp_path / "x", **WANTED)
    with pytest.raises(OSError, match="No such file"):
        read_saved(tmp_path / "y", **WANTED)
