"""The scans that all tests of the report draw: stock's and fixed's."""

import pytest

import qwen2_fp16_fix
from qwen2_fp16_fix.scanning.result import ScanResult
from tests.stress import TINY, build, random_prompt


@pytest.fixture(scope="package")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[ScanResult]:
    """Stock's and fixed's, of a checkpoint with everything planted."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build(TINY, ("scores", "residual", "swiglu", "massive")).half().save_pretrained(folder)
    ids = [random_prompt(TINY, 1, 40, seed=1), random_prompt(TINY, 1, 12, seed=2)]
    return [qwen2_fp16_fix.scan(folder, ids, fixed=fixed, device="cpu") for fixed in (False, True)]
