"""torch's default dtype and default device: engines set both while they load, and nothing of ours may follow them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import qwen2_fp16_fix
from qwen2_fp16_fix.diagnosis import self_test
from qwen2_fp16_fix.patches import numerics, v4_37
from tests.helpers import kl_to
from tests.patches.models import rotation_of
from tests.stress import KINDS, TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=2, length=24)
MASK = torch.ones_like(PROMPT).index_put_((torch.zeros(5, dtype=torch.long), torch.arange(5)), torch.tensor(0))
DEFAULTS = [torch.float16, torch.bfloat16, torch.float64]


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def logits(model: Any, padded: bool = True, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=PROMPT, attention_mask=MASK if padded else None, **inputs).logits
    return found


def half(attention: str = "eager", kinds: tuple[str, ...] = KINDS, **settings: Any) -> Any:
    return build(TINY, kinds, attn_implementation=attention, **settings).half()


def constants(model: Any) -> list[Any]:
    """What planning leaves in the layers, with the tables' frequencies."""
    found: list[Any] = [model.model.rotary_emb.frequencies()]
    for layer in model.model.layers:
        for part in (layer.mlp, layer.self_attn):
            found += [*(part.scale or [None]), *(getattr(part, name, None) for name in ("shift", "factor"))]
    return found


def same(one: Any, other: Any) -> bool:
    """Equal, with the dtype where there is one."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize("dtype", DEFAULTS, ids=str)
def test_planning_finds_the_same_constants(dtype: torch.dtype) -> None:
    """Made in float16, a factor of 2^16 is infinite; in float64 it widens what it meets."""
    expected = constants(qwen2_fp16_fix.fix(half()))
    model = half()
    with default(dtype):
        qwen2_fp16_fix.fix(model)
    assert any(isinstance(constant, int) and constant > 0 for constant in expected)
    assert all(same(one, other) for one, other in zip(expected, constants(model), strict=True))


@pytest.mark.parametrize("dtype", DEFAULTS, ids=str)
@pytest.mark.parametrize("rope", [None, "linear", "dynamic", "yarn", "longrope", "llama3"])
def test_frequencies_that_a_cast_has_rounded_are_found_again(rope: str | None, dtype: torch.dtype) -> None:
    """They are computed anew by stock's constructor, and then the tables from them."""
    rotation = rotation_of(rope)

    def tables(model: Any) -> list[Tensor]:
        positions = torch.arange(40)[None]
        return [*model.model.rotary_emb(torch.zeros(1).half(), positions), model.model.rotary_emb.frequencies()]

    expected = tables(qwen2_fp16_fix.fix(half(**rotation)))
    model = half(**rotation)
    with default(dtype):
        found = tables(qwen2_fp16_fix.fix(model))
    assert {table.dtype for table in found} == {torch.float32}
    assert all(same(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", DEFAULTS, ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("arithmetic", ["a CPU's", "a GPU's"])
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "by token"])
def test_a_fixed_model_computes_the_same_bits(
    planned: bool, arithmetic: str, attention: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded and not, whole and from a cache."""
    if arithmetic == "a GPU's":
        monkeypatch.setattr(numerics, "runs_on_cpu", lambda tensor: False)
    model = qwen2_fp16_fix.fix(half(attention))
    if not planned:
        for layer in model.model.layers:
            for part in (layer.mlp, layer.self_attn):
                part.set_exponent(None)

    def run() -> list[Tensor]:
        inputs = {"input_ids": PROMPT, "attention_mask": MASK}
        cached = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        return [logits(model), logits(model, padded=False), cached]

    expected = run()
    with default(dtype):
        found = run()
    assert torch.isfinite(found[0]).all()
    assert all(same(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", DEFAULTS, ids=str)
def test_an_fp32_and_a_bfloat16_model_compute_the_same_bits(dtype: torch.dtype) -> None:
    for kind in (torch.float32, torch.bfloat16):
        model = qwen2_fp16_fix.fix(build(TINY, ("keys", "scores")).to(kind))
        expected = logits(model)
        with default(dtype):
            assert same(expected, logits(model))


@pytest.mark.parametrize("dtype", DEFAULTS, ids=str)
@pytest.mark.parametrize("way", ["drop-in class", "stock class, then fix"])
def test_a_checkpoint_loaded_under_another_default_is_the_same_model(
    way: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As engines load. It was NaN, and status said fixed and proven."""
    build(TINY, KINDS).half().save_pretrained(tmp_path)

    def load() -> Any:
        auto = transformers.AutoModelForCausalLM
        if way == "drop-in class":
            with qwen2_fp16_fix.registered():
                return auto.from_pretrained(tmp_path, dtype=torch.float16).eval()
        return qwen2_fp16_fix.fix(auto.from_pretrained(tmp_path, dtype=torch.float16).eval())

    model = load()
    proof = qwen2_fp16_fix.certify(tmp_path)
    with default(dtype):
        other = load()
        assert replace(qwen2_fp16_fix.certify(tmp_path), seconds=0) == replace(proof, seconds=0)
        assert qwen2_fp16_fix.certify(other).layers == proof.layers
        found = logits(other)
    assert all(same(one, two) for one, two in zip(constants(model), constants(other), strict=True))
    assert same(logits(model), found)
    assert kl_to(logits(build(TINY, KINDS)), found) < 4e-5  # float16's own rounding with every kind at once


@pytest.mark.parametrize("dtype", DEFAULTS, ids=str)
def test_tables_of_old_releases_are_the_same_bits(dtype: torch.dtype) -> None:
    """4.37 to 4.44 make theirs at the first call."""

    def tables() -> list[Tensor]:
        rotary = v4_37.RotaryEmbedding()
        rotary.dim, rotary.base = 64, 1e6
        return [*rotary(torch.zeros(1).half(), 3000), rotary.frequencies()]

    expected = tables()
    with default(dtype):
        assert all(same(one, other) for one, other in zip(expected, tables(), strict=True))


@pytest.mark.parametrize("dtype", DEFAULTS, ids=str)
def test_masks_are_made_in_the_same_dtype(dtype: torch.dtype) -> None:
    boolean = torch.tensor([[[[True, False], [False, False]]]])
    additive = torch.zeros(1, 1, 2, 2).half().masked_fill(~boolean, torch.finfo(torch.float16).min)
    made = (numerics.widen_mask, numerics.mask_to_minus_inf)
    expected = [prepare(mask, 2) for prepare in made for mask in (boolean, additive)]
    with default(dtype):
        found = [prepare(mask, 2) for prepare in made for mask in (boolean, additive)]
    assert all(same(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", DEFAULTS, ids=str)
def test_the_commands_find_the_same(dtype: torch.dtype) -> None:
    """doctor's self-test, and a scan, whose second run in fp32 is its oracle."""
    expected = self_test.self_test("cpu"), qwen2_fp16_fix.scan(half(), prompts=[PROMPT[0]])
    with default(dtype):
        found = self_test.self_test("cpu"), qwen2_fp16_fix.scan(half(), prompts=[PROMPT[0]])
    assert expected[0] == found[0]
    assert expected[0].passed
    assert replace(expected[1], seconds=0) == replace(found[1], seconds=0)


# --- the default device ---


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """A default device on which nothing can be computed: whatever forgets to name its own fails there."""
    with torch.device("meta"):  # what set_default_device enters for good
        yield


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nothing_is_made_on_the_default_device(attention: str, request: pytest.FixtureRequest) -> None:
    """As under `torch.set_default_device("cuda")` with a model on the CPU, or on the next card."""
    model, stock = half(attention), self_test.stock_model(attention)
    expected, proof = constants(qwen2_fp16_fix.fix(half(attention))), qwen2_fp16_fix.certify(model)
    logits_there = logits(qwen2_fp16_fix.fix(half(attention)))
    request.getfixturevalue("elsewhere")
    qwen2_fp16_fix.fix(model)
    assert all(same(one, other) for one, other in zip(expected, constants(model), strict=True))
    assert qwen2_fp16_fix.certify(model).layers == proof.layers
    assert same(logits_there, logits(model))
    assert self_test.prompt().device.type == "cpu"
    assert same(stock.lm_head.weight, self_test.stock_model(attention).lm_head.weight)


@pytest.mark.usefixtures("elsewhere")
def test_frequencies_of_old_releases_are_not_made_on_the_default_device() -> None:
    rotary = v4_37.RotaryEmbedding()
    rotary.dim, rotary.base = 64, 1e6
    assert rotary.frequencies().device.type == "cpu"
    assert {table.device.type for table in rotary(torch.zeros(1, device="cpu").half(), 16)} == {"cpu"}
