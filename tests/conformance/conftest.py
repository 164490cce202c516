"""The conformance suite: what a fixed Qwen2 promises, checked on whichever transformers release is installed.

`make matrix` runs this folder once on every listed release, so it needs nothing but torch, transformers and pytest, and
no test in it may skip: what a release does not have is left out of the parametrisation.
"""

from collections.abc import Iterator

import pytest
import torch
from packaging.version import Version

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import numerics


@pytest.fixture(autouse=True)
def as_in_any_order() -> Iterator[None]:
    """Each test starts with the same random numbers, and starts and ends with stock Auto classes."""
    torch.manual_seed(0)
    yield
    qwen2_fp16_fix.unregister()


#: Before torch 2.5 a CPU's fused attention takes scores in 16 bit for operands in 16 bit, as no kernel of a GPU does.
ARITHMETICS = ["cpu", "gpu"] if Version(Version(torch.__version__).base_version) >= Version("2.5") else ["cpu"]


@pytest.fixture(params=ARITHMETICS)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which a fixed model rounds: a CPU's and a GPU's, whose kernels take operands in 16 bit.

    The second is computed here on a CPU. What it cannot show is what a GPU's own kernels do.
    """
    monkeypatch.setattr(numerics, "runs_on_cpu", lambda tensor: request.param == "cpu")
    chosen: str = request.param
    return chosen
