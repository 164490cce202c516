"""Every public function refuses a path that is empty, has a NUL character or is not UTF-8, with its own error."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwen2_fp16_fix as q
from qwen2_fp16_fix import demo

DEMO = demo.CHECKPOINT
FUNCTIONS: dict[str, tuple[Callable[[Any], object], type[Exception]]] = {
    "certify": (q.certify, q.CheckpointError),
    "verify": (q.verify, q.CheckpointError),
    "verify resume": (lambda path: q.verify(DEMO, resume=path), q.VerificationError),
    "scan": (q.scan, q.CheckpointError),
    "export": (lambda path: q.export(path, "out"), q.CheckpointError),
    "export out": (lambda path: q.export(DEMO, path), q.ExportError),
    "export verification": (lambda path: q.export(DEMO, "out", verification=path), q.ExportError),
    "push": (lambda path: q.push(path, "owner/name", dry_run=True), q.CheckpointError),
    "doctor": (q.doctor, q.CheckpointError),
    "lock": (q.lock, q.LockFileError),
    "check": (q.check, q.LockFileError),
    "demo save": (demo.save, q.ExportError),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_path_that_is_none_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`certify("")` looked at the current folder, and a name that is not UTF-8 was called damaged."""
    monkeypatch.chdir(tmp_path)
    function, refusal = FUNCTIONS[name]
    for path, words in (("", "a path is empty"), ("a\0b", "NUL character"), (os.fsdecode(b"caf\xe9"), "not UTF-8")):
        with pytest.raises(refusal, match=words) as caught:
            function(path)
        assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []
