"""What verify has returned is read back: a result, plain data or a file. What differs in any key is refused."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen2_fp16_fix.errors import ScanError
from qwen2_fp16_fix.results import Result
from qwen2_fp16_fix.verification.saved import read_saved
from tests.files.damage import damaged

RECORDED = json.loads((Path(__file__).parent / "recorded_verification.json").read_text(encoding="utf-8"))
ROW = ("name", "dtype", "fixed", "finite", "perplexity", "drift", "kl_mean", "kl_max", "top1_agreement")
ROW += ("largest_logit_difference", "first_overflow")
#: What is read of it, and no more.
PLAIN: dict[str, Any] = {
    "versions": {name: RECORDED["versions"][name] for name in ("transformers", "torch")},
    "checkpoint": RECORDED["checkpoint"],
    "settings": {name: RECORDED["settings"][name] for name in ("tokens", "window", "device")},
    "rows": [{name: row[name] for name in ROW} for row in RECORDED["rows"]],
    "verdict": RECORDED["verdict"],
}


@dataclass(frozen=True, repr=False)
class Found(Result):
    versions: dict[str, Any]
    checkpoint: str
    settings: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    verdict: str


def test_a_result_plain_data_and_a_file_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    file.write_text(json.dumps(PLAIN))
    result = Found(**PLAIN | {"rows": tuple(PLAIN["rows"])})
    assert all(read_saved(given, ScanError) == PLAIN for given in (result, PLAIN, file, str(file)))
    assert read_saved(RECORDED, ScanError) == RECORDED


def test_what_lacks_a_key_or_has_another_type_is_refused(tmp_path: Path) -> None:
    """A text for a number was a traceback, once the scan for the report had run."""
    file, cases = tmp_path / "verify.json", 0
    for data, place in damaged(PLAIN):
        file.write_text(json.dumps(data))
        for given in (data, file):
            with pytest.raises(ScanError, match=f"is not a result of verify .*{re.escape(place)}"):
                read_saved(given, ScanError)
        cases += 1
    assert cases > 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": []}, "it has no rows"),
        ({"rows": [1]}, "rows[0] is 1, not an object"),
        ({"rows": "no"}, "rows is 'no', not a list"),
        ({"settings": PLAIN["settings"] | {"tokens": True}}, "settings.tokens is True, not a whole number"),
        ({"settings": PLAIN["settings"] | {"window": 1.5}}, "settings.window is 1.5, not a whole number"),
        ({"rows": [PLAIN["rows"][0] | {"drift": float("nan")}]}, "drift is nan, not a finite number or null"),
        ({"rows": [PLAIN["rows"][0] | {"fixed": 1}]}, "rows[0].fixed is 1, not true or false"),
    ],
)
def test_the_sentence_names_the_place(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ScanError, match=re.escape(words)):
        read_saved(PLAIN | change, ScanError)


@pytest.mark.parametrize("text", ["[]", "1", '"text"', "null", "mine", "{}"])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(ScanError, match="name a file with the JSON that `qwen2-fp16-fix verify PATH --json` prints"):
        read_saved(tmp_path / "x", ScanError)
    with pytest.raises(ScanError, match="No such file"):
        read_saved(tmp_path / "y", ScanError)
    with pytest.raises(ScanError, match="a path is empty"):
        read_saved("", ScanError)
