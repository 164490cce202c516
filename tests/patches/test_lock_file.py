"""Whatever is read in place of a lock ends in one sentence, at once and in little memory."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import qwen2_fp16_fix as q
from qwen2_fp16_fix.patches import lock_file

DIGEST = "0" * 64
LOCK: dict[str, Any] = {
    "format": lock_file.FORMAT,
    "package": "0.2.0",
    "numerics": 2,
    "transformers": "5.24.0",
    "torch": "2.13.0+cpu",
    "patches": {"numerics.py": DIGEST},
    "package_files": {"qwen2_fp16_fix/locking.py": DIGEST},
    "upstream": {"Qwen2MLP": f"code {DIGEST}"},
    "upstream_files": {"cache_utils.py": DIGEST},
    "upstream_tree": DIGEST,
    "other_code": {},
}
HUGE = "9" * 310
BYTES: dict[str, bytes] = {
    "nothing": b"",
    "a list": b"[]",
    "not UTF-8": b'{"format": "\xff"}',
    "a list in a list, 100,000 times": b"[" * 100_000,
    "an object in an object, 100,000 times": b'{"format":' * 100_000,
    "a number of 310 digits": f'{{"format": {HUGE}}}'.encode(),
    "a number of 5,000 digits": f'{{"format": {"9" * 5000}}}'.encode(),
    "no number": b'{"format": NaN}',
    "a truth value": b'{"format": true}',
    "half a surrogate pair": json.dumps(LOCK | {"torch": "\ud800"}).encode(),
    "half a surrogate pair in a name": json.dumps(LOCK | {"patches": {"\udfff": DIGEST}}).encode(),
    "a key given twice": json.dumps(LOCK).replace('"torch"', '"package"').encode(),
    "more than a lock has": b" " * (lock_file.LIMIT + 1),
}

OTHER_KINDS: list[Any] = [None, [], 1.5, -1, 10**40, "", "a\nb", "x" * 9999]
OTHER_KINDS += [{"a": 1}, {"a": None}, {"a": ["b"]}, {"a": "\n"}, {"\n": DIGEST}]


def refusal(path: str | Path) -> str:
    """The sentence about a file that is no lock."""
    with pytest.raises(q.LockFileError) as caught:
        lock_file.read_lock(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert said.isprintable()
    assert len(said) < 600
    return said


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "lock.json"
    path.write_text(json.dumps(content))
    return path


def test_a_whole_lock_is_read(tmp_path: Path) -> None:
    assert lock_file.read_lock(written(tmp_path, LOCK)) == LOCK


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_no_lock(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    path.write_bytes(BYTES[kind])
    assert "qwen2-fp16-fix lock" in refusal(path)


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device", "a circle of links", "nothing"])
def test_what_is_no_file(kind: str, tmp_path: Path) -> None:
    """A device without an end, and a pipe that nobody writes into, kept a check waiting."""
    path = tmp_path / "lock.json"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path = Path("/dev/zero")
    elif kind == "a circle of links":
        path.symlink_to(path)
    assert "cannot be read as a lock" in refusal(path)


@pytest.mark.parametrize("field", [*LOCK])
@pytest.mark.parametrize("value", OTHER_KINDS, ids=lambda value: repr(value)[:20])
def test_a_value_of_another_kind_is_named(field: str, value: Any, tmp_path: Path) -> None:
    """A number where a digest belongs ended in a traceback, or compared as different."""
    said = refusal(written(tmp_path, LOCK | {field: value}))
    assert field == "format" or f"whose {field}" in said
    without = {name: each for name, each in LOCK.items() if name != field}
    assert field == "format" or f"a lock without {field}:" in refusal(written(tmp_path, without))


@pytest.mark.parametrize("field", ["patches", "package_files", "upstream", "upstream_files"])
@pytest.mark.parametrize("value", ["text", "G" * 64, DIGEST + "\n", 7, None])
def test_a_value_that_is_no_digest_is_named_with_its_key(field: str, value: Any, tmp_path: Path) -> None:
    path = written(tmp_path, LOCK | {field: {"good.py": DIGEST, "bad.py": value}})
    assert f"is a lock whose {field}['bad.py'] is not a digest: make a new one" in refusal(path)
    assert f"whose {field} is not a digest for each name" in refusal(written(tmp_path, LOCK | {field: {}}))


def test_a_lock_of_an_older_format_says_so(tmp_path: Path) -> None:
    assert f"is a lock of format 1, and this version reads {lock_file.FORMAT}: make a new lock, or " in refusal(
        written(tmp_path, {"format": 1})
    )
