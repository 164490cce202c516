"""What `register` wraps is itself again after each test; the checkpoint that several files here load."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import auto_factory

import qwen2_fp16_fix
from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import STOCK
from tests.registration.models import PROMPT
from tests.stress import TINY, build

WRAPPED = (
    (STOCK.Qwen2Model, "__init__"),
    (STOCK.Qwen2Model, "__init_subclass__"),
    (auto_factory, "get_class_from_dynamic_module"),
)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """What `register` has wrapped is itself again after each test."""
    before = [vars(owner).get(name) for owner, name in WRAPPED]
    yield
    qwen2_fp16_fix.unregister()
    assert [vars(owner).get(name) for owner, name in WRAPPED] == before


@pytest.fixture(scope="module")
def source() -> Any:
    """A stock fp32 model that breaks stock float16 in eager."""
    return build(TINY, ("scores", "residual"), attn_implementation="eager")


@pytest.fixture(scope="module")
def folder(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    copy.deepcopy(source).half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def oracle(source: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = source.model(input_ids=PROMPT).last_hidden_state
    return found
