"""Attention functions of other models and other tools, in transformers' table under any name."""

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen2 import modeling_qwen2

import qwen2_fp16_fix
from tests.registration.models import PROMPT
from tests.stress import TINY


def stock_attention(monkeypatch: pytest.MonkeyPatch, name: str, function: Any) -> None:
    table = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(table._global_mapping, name, function)
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks._global_mapping, name, masks["eager"])


def copied() -> Any:
    from transformers.models.llama.modeling_llama import eager_attention_forward

    return eager_attention_forward


def wrapping(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


STOCK_EAGER = {
    "itself": modeling_qwen2.eager_attention_forward,
    "another model's": copied(),
    "partial": functools.partial(copied()),
}


@pytest.mark.parametrize(("name", "compiled"), [("eager", False), ("mine", False), ("sdpa", False), ("mine", True)])
@pytest.mark.parametrize("kind", STOCK_EAGER)
def test_ours_stands_in_for_stocks_eager_under_any_name(
    kind: str, name: str, compiled: bool, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered, it ran in place of ours: NaN, and `status` named no problem."""
    expected = qwen2_fp16_fix.fix(copy.deepcopy(source).half())(input_ids=PROMPT).logits
    stock_attention(monkeypatch, name, STOCK_EAGER[kind])
    model = qwen2_fp16_fix.fix(copy.deepcopy(source).half())
    model.set_attn_implementation(name)
    assert qwen2_fp16_fix.status(model).model.problem is None
    torch._dynamo.reset()
    run: Any = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    found = run(input_ids=PROMPT, use_cache=False).logits
    # a compiler takes addcmul apart and rounds in fp32 once more: a float16 step of a logit of 4
    torch.testing.assert_close(found, expected, atol=4e-3 if compiled else 0, rtol=0)


def around(function: Any) -> Any:
    """As attribution tools wrap every function of the table."""

    def tool(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return tool


INSIDE = {
    "wraps": wrapping(copied()),
    "partial": functools.partial(copied(), dropout=0.0),
    "closure": around(copied()),
    "closure of a wrapper": around(wrapping(copied())),
}


@pytest.mark.parametrize("function", INSIDE.values(), ids=INSIDE)
def test_stocks_eager_inside_something_else_is_refused(
    function: Any, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock_attention(monkeypatch, "mine", function)
    model = qwen2_fp16_fix.fix(copy.deepcopy(source).half())
    model.set_attn_implementation("mine")
    assert "mine" in qwen2_fp16_fix.status(model).model.problem
    with pytest.raises(qwen2_fp16_fix.HalfPrecisionScoresError, match="mine"):
        model(input_ids=PROMPT)


def test_another_function_is_called(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def mine(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        calls.append(query.dtype)
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None

    stock_attention(monkeypatch, "mine", mine)
    model = qwen2_fp16_fix.fix(copy.deepcopy(source).half())
    model.set_attn_implementation("mine")
    model(input_ids=PROMPT)
    assert calls == [torch.float16] * TINY.layers


def test_status_names_a_function_that_has_taken_the_place_of_transformers_own(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = qwen2_fp16_fix.fix(copy.deepcopy(source).half())
    model.set_attn_implementation("sdpa")
    assert qwen2_fp16_fix.status(model).model.attention == "sdpa"
    stock_attention(monkeypatch, "sdpa", around(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]))
    found = qwen2_fp16_fix.status(model)
    assert found.model.attention.startswith("sdpa (tests.registration.test_attention_functions.around")
    assert "test_attention_functions.around" in found.summary()
