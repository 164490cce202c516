"""The demo's table, run once for all tests of verify, and a tiny checkpoint."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen2_fp16_fix
from qwen2_fp16_fix.files.packaged import DEMO_CHECKPOINT
from qwen2_fp16_fix.verification import rows, verify
from qwen2_fp16_fix.verification.result import VerificationResult
from tests.verification.letters import table, tiny


@pytest.fixture(scope="session", autouse=True)
def short_texts() -> Iterator[None]:
    """What `verify` generates is most of its time here, and no test asks for much of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "NEW_TOKENS", 6)
        yield


@pytest.fixture(scope="session")
def findings(short_texts: None) -> VerificationResult:
    return qwen2_fp16_fix.verify(DEMO_CHECKPOINT, window=256, stride=128, tokens=300, device="cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny(tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def loads_and_table(
    short_texts: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], VerificationResult]:
    """Every row of the tiny checkpoint, and the rows that were loaded for it: `loads`."""
    with watched_loads() as loads:
        return loads, table(tiny(tmp_path_factory.mktemp("tiny") / "checkpoint"), max_kl=1e-12)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle and float16 eager, for tests that ask nothing of the others."""
    few = [rows.ORACLE, *(rows.Row("float16", "eager", fixed) for fixed in (False, True))]
    monkeypatch.setattr(verify, "planned_rows", lambda device: few)
    monkeypatch.setattr(rows, "NEW_TOKENS", 4)


@pytest.fixture
def loads() -> Iterator[list[str]]:
    """The rows that are loaded; at each load every model loaded before must be gone."""
    with watched_loads() as names:
        yield names


@contextmanager
def watched_loads() -> Iterator[list[str]]:
    """What `loads` gives, while entered."""
    alive: list[weakref.ref[Any]] = []
    names: list[str] = []
    plain = rows.load

    def watched(folder: Path, fixed: bool, dtype: torch.dtype, attention: str) -> Any:
        assert all(model() is None for model in alive), f"a model is still there as number {len(alive) + 1} is loaded"
        names.append(f"{'fixed' if fixed else 'stock'} {str(dtype).removeprefix('torch.')} {attention}")
        model = plain(folder, fixed, dtype, attention)
        model.__dict__["cycle"] = model  # as hooks and caches make them: such a model outlives its last name
        alive.append(weakref.ref(model))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "load", watched)
        gc.disable()  # what frees the models must be the code, not luck
        try:
            yield names
        finally:
            gc.enable()
