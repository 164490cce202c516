"""The conformance suite: what a fixed Qwen2 promises, checked on whichever transformers release is installed.

`make matrix` runs this folder once on every listed release, so it needs nothing but torch, transformers and pytest, and
no test in it may skip: what a release does not have is left out of the parametrisation.
"""

from collections.abc import Iterator

import pytest
import torch

import qwen2_fp16_fix


@pytest.fixture(autouse=True)
def as_in_any_order() -> Iterator[None]:
    """Each test starts with the same random numbers, and starts and ends with stock Auto classes."""
    torch.manual_seed(0)
    yield
    qwen2_fp16_fix.unregister()
