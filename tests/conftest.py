"""What several test files share: tiny stress models, and a process that starts clean and leaves nothing registered."""

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("QWEN2_FP16_FIX", None)
MODULES = tempfile.TemporaryDirectory(prefix="qwen2-fp16-fix-modules-", ignore_cleanup_errors=True)
os.environ["HF_MODULES_CACHE"] = MODULES.name  # where transformers puts remote code: not among the user's own


def pytest_collection_finish() -> None:
    """What the imports made stays: a full collection, two a row of `verify`, would walk through torch each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def as_in_any_order() -> Iterator[None]:
    """Every test starts with the same random numbers and with transformers' own Auto classes, whatever ran before."""
    torch.manual_seed(0)
    yield
    if "qwen2_fp16_fix.registration.register" in sys.modules:
        sys.modules["qwen2_fp16_fix.registration.register"].unregister()


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a Python of its own, with the checkout importable, for what must not touch this process.

    It is found as `python`, too, also where the machine has no program of that name.
    """
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env={**os.environ, "PATH": programs, "PYTHONPATH": path, **environment},
        )

    return run
