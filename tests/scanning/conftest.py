"""Stress checkpoints and their scans, each made once for all tests of the scan."""

from collections.abc import Callable
from pathlib import Path

import pytest

import qwen2_fp16_fix
from qwen2_fp16_fix.scanning.result import ScanResult
from tests.scanning.planted import PROMPT, text_of, write_tokenizer
from tests.stress import TINY, build


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Stress checkpoints by their kinds, each built once, with a tokenizer."""
    built: dict[tuple[str, ...], Path] = {}

    def folder(*kinds: str) -> Path:
        if kinds not in built:
            built[kinds] = tmp_path_factory.mktemp("-".join(kinds) or "plain")
            build(TINY, kinds).half().save_pretrained(built[kinds])
            write_tokenizer(built[kinds])
        return built[kinds]

    return folder


@pytest.fixture(scope="session")
def scans(folders: Callable[..., Path]) -> Callable[..., ScanResult]:
    """Scans by kind, each made once."""
    made: dict[tuple[str, bool], ScanResult] = {}

    def scan(kind: str, fixed: bool = False) -> ScanResult:
        if (kind, fixed) not in made:
            made[kind, fixed] = qwen2_fp16_fix.scan(folders(kind), text_of(PROMPT), fixed=fixed, device="cpu")
        return made[kind, fixed]

    return scan


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test whose bad input is noticed only after the run."""
    monkeypatch.setattr("qwen2_fp16_fix.scanning.scan.measure_prompts", lambda *_: pytest.fail("ran before the check"))
