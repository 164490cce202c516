"""Finite, accurate, causal: the promises about what a fixed model computes."""

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

import qwen2_fp16_fix
from tests.conformance.models import (
    ATTENTIONS,
    CACHE,
    CLOSE,
    MASKED_ATTENTIONS,
    PROMPT,
    RELEASE,
    SDPA_SCORES_ARE_FP32,
    STRESSES,
    fixed_half,
    kl,
    logits,
    padded,
    stress,
)
from tests.stress import KINDS, ROPE_THETA, TINY, random_prompt

pytestmark = pytest.mark.usefixtures("arithmetic")

#: For tests in which a fixed model runs stock's code, or that are not about what it computes.
in_one_arithmetic = pytest.mark.parametrize("arithmetic", ["cpu"], indirect=True)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kinds", [(), *STRESSES], ids="+".join)
@in_one_arithmetic
def test_fp32_is_bit_identical_to_stock(kinds: tuple[str, ...], attention: str) -> None:
    """An fp32 model has nothing to repair: a user may leave the fix on."""
    tokens, mask = padded()
    inputs: dict[str, Any] = {"attention_mask": mask, "output_hidden_states": True}
    with torch.no_grad():
        stock = stress(kinds, attention)(input_ids=tokens, **inputs)
        fixed = qwen2_fp16_fix.fix(stress(kinds, attention))(input_ids=tokens, **inputs)
    assert torch.equal(stock.logits, fixed.logits)
    assert all(torch.equal(a, b) for a, b in zip(stock.hidden_states, fixed.hidden_states, strict=True))


# From 4.53 sdpa gives no weights when asked; before, it hands over to eager.
@pytest.mark.parametrize("attention", ("eager", "sdpa") if RELEASE < Version("4.53") else ("eager",))
@in_one_arithmetic
def test_fp32_attentions_are_bit_identical_to_stock(attention: str) -> None:
    """Asked for weights, some releases take another branch; an fp32 model must leave it alone as well."""
    tokens, mask = padded()
    with torch.no_grad():
        stock = stress((), attention)(input_ids=tokens, attention_mask=mask, output_attentions=True)
        model = qwen2_fp16_fix.fix(stress((), attention))
        fixed = model(input_ids=tokens, attention_mask=mask, output_attentions=True)
    assert torch.equal(stock.logits, fixed.logits)
    assert len(fixed.attentions) == TINY.layers
    assert all(torch.equal(a, b) for a, b in zip(stock.attentions, fixed.attentions, strict=True))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kinds", STRESSES, ids="+".join)
def test_float16_is_finite_and_close_where_stock_is_neither(kinds: tuple[str, ...], attention: str) -> None:
    """The mission in one test. sdpa keeps its scores in fp32, so they alone break stock in eager only."""
    oracle = logits(stress(kinds, attention))
    halves_scores = attention == "eager" or not SDPA_SCORES_ARE_FP32
    stock_breaks = (halves_scores and "scores" in kinds) or bool({"residual", "swiglu"} & set(kinds))
    assert torch.isfinite(logits(stress(kinds, attention).half())).all() != stock_breaks
    assert kl(oracle, logits(fixed_half(kinds, attention))) < CLOSE


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Stands for the flash kernel, which needs a GPU: exact causal attention of (B, S, heads, D)."""
    repeats = query.shape[2] // key.shape[2]
    operands = [query, key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)]
    exact = [operand.transpose(1, 2).float() for operand in operands]
    output = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True)
    return output.transpose(1, 2).to(query.dtype)


if RELEASE < Version("4.48"):  # a class of its own for each backend

    def test_flash_attention_is_fixed_planned_and_cast(monkeypatch: pytest.MonkeyPatch) -> None:
        """Around the kernel all is fixed but o_proj: that forward is stock's, and says no exponent."""
        import transformers.models.qwen2.modeling_qwen2 as stock

        monkeypatch.setattr(stock, "_flash_attention_forward", attend, raising=False)  # from 4.43; a method before
        monkeypatch.setattr(stock, "_flash_supports_window_size", False, raising=False)  # to 4.42
        method = lambda self, *tensors, **options: attend(*tensors)  # noqa: E731
        monkeypatch.setattr(stock.Qwen2FlashAttention2, "_flash_attention_forward", method, raising=False)
        model = stress(("swiglu", "residual"), "eager").half()
        for layer in model.model.layers:
            layer.self_attn.__class__ = stock.Qwen2FlashAttention2
            layer.self_attn._flash_attn_uses_top_left_mask = False
        model.config._attn_implementation = model.model._attn_implementation = "flash_attention_2"
        oracle = logits(stress(("swiglu", "residual"), "eager"))
        for cast in (model.half, model.float, model.half):
            cast()
            assert kl(oracle, logits(qwen2_fp16_fix.fix(model))) < CLOSE
            found = qwen2_fp16_fix.status(model).model
            assert found.fixed
            assert {row.o_proj for row in found.ranges} == {"not scaled"}
            assert all(isinstance(row.mlp, int) for row in found.ranges)


def scaled_rope(kind: str, factor: float = 4.0) -> dict[str, Any]:
    """Settings for a long-context RoPE that begins to matter beyond 8 positions."""
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": 8}
    if kind == "longrope":
        pairs = TINY.head_dim // 2
        scaling |= {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    longest = 32 if kind == "yarn" else 8  # 4.51 to 4.55 take yarn's factor from the quotient
    if RELEASE >= Version("5.0"):
        return {"rope_parameters": {**scaling, "rope_theta": 1e6}, "max_position_embeddings": longest}
    return {"rope_scaling": scaling, "rope_theta": 1e6, "max_position_embeddings": longest}


if RELEASE >= Version("4.45"):  # Qwen2 has no scaled RoPE before

    @pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
    def test_scaled_rotations_are_stocks(kind: str) -> None:
        """Qwen2.5 reaches 128k tokens by yarn: its tables come from stock's code, in fp32."""
        settings = scaled_rope(kind)
        oracle = logits(stress(("scores",), **settings))
        assert torch.equal(oracle, logits(qwen2_fp16_fix.fix(stress(("scores",), **settings))))
        assert not torch.equal(oracle, logits(stress(("scores",))))
        assert kl(oracle, logits(fixed_half(("scores",), **settings))) < CLOSE

    @pytest.mark.parametrize("attention", ATTENTIONS)
    def test_pairs_of_frequency_0_are_centred_without_nan(attention: str) -> None:
        """A huge factor leaves no pair that turns. The mean of a turn that never starts was 0/0: a NaN in each key."""
        settings = scaled_rope("linear", factor=1e46)
        model = fixed_half(("keys",), attention, **settings)
        assert not model.model.rotary_emb.inv_freq.any()
        assert {row.keys for row in qwen2_fp16_fix.status(model).model.ranges} == {"centred"}
        assert kl(logits(stress(("keys",), **settings)), logits(model)) < CLOSE

    class InTf32(TorchDispatchMode):
        """Rounds the operands of fp32 matmuls to 10 bits of mantissa, as float32_matmul_precision "high" allows."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            matmuls = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
            return function(*map(tf32, args) if function in matmuls else args, **(kwargs or {}))

    def tf32(operand: torch.Tensor) -> torch.Tensor:
        """An fp32 operand rounded to nearest; others as they are."""
        if operand.dtype != torch.float32:
            return operand
        return ((operand.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", [None, "linear", "dynamic", "yarn", "longrope"])
    @in_one_arithmetic
    def test_rotation_tables_are_fp32_whatever_matmuls_are(kind: str | None, dtype: torch.dtype) -> None:
        """Up to 5.17 or later stock's angles are a matmul, and TF32 makes of position 16,001 position 16,000.

        Stock's tables without TF32 are the oracle, bit for bit, also where frequencies follow the length and back.
        """
        settings = {} if kind is None else scaled_rope(kind)
        stock = stress((), **settings).model.rotary_emb
        fixed = qwen2_fp16_fix.fix(stress((), **settings).to(dtype)).model.rotary_emb
        exact = fixed.frequencies().clone()
        for start in (15_970, 0, 15_990):
            positions = torch.stack((torch.arange(start, start + 6), torch.arange(start + 5, start + 11)))
            expected = stock(torch.zeros(1), positions)
            with InTf32():
                found = fixed(torch.zeros(1, dtype=dtype), positions)
            assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
            assert torch.equal(fixed.frequencies(), stock.inv_freq)
            assert {table.dtype for table in found} == {torch.float32}
            angle = (positions[..., None].double() * fixed.frequencies().double()).repeat(1, 1, 2)
            for table, function in zip(found, (torch.cos, torch.sin), strict=True):
                # an angle up to 16,000 has half a step of 2^-11 in fp32
                assert (table.double() / fixed.attention_scaling - function(angle)).abs().max() < 2**-11 * 1.01
        assert torch.equal(fixed.frequencies(), exact) or kind in ("dynamic", "longrope")
        assert not torch.equal(fixed.frequencies(), exact) or kind != "dynamic"

    @in_one_arithmetic
    def test_rotation_tables_of_an_fp32_model_are_stocks_under_tf32_too() -> None:
        """What a user has chosen for an fp32 model stands."""
        model = stress()
        positions = torch.arange(15_970, 16_000).expand(2, -1)
        with InTf32():
            expected = model.model.rotary_emb(torch.zeros(1), positions)
            found = qwen2_fp16_fix.fix(model).model.rotary_emb(torch.zeros(1), positions)
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kinds", [("keys",), KINDS], ids="+".join)
def test_keys_keep_what_they_say_beside_a_spike(kinds: tuple[str, ...], attention: str, dtype: torch.dtype) -> None:
    """A spike of 300 in a pair that says something: its float16 step is 0.25, in every backend, and bf16's is 2."""
    oracle = logits(stress(kinds))
    ordinary = CLOSE if dtype == torch.float16 else 64 * CLOSE  # 3 bits less
    assert kl(oracle, logits(qwen2_fp16_fix.fix(stress(kinds, attention).to(dtype)))) < 2 * ordinary
    assert kl(oracle, logits(stress(("keys",), "sdpa").to(dtype))) > 50 * ordinary


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_an_ordinary_model_comes_closer_than_stock(attention: str) -> None:
    """The norms round once instead of twice: the fix must not cost precision where nothing overflows."""
    oracle = logits(stress((), attention))
    assert kl(oracle, logits(fixed_half((), attention))) < kl(oracle, logits(stress((), attention).half()))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kinds", [(), ("scores", "residual"), ("keys",)], ids="+".join)
def test_left_padding_changes_nothing(kinds: tuple[str, ...], attention: str) -> None:
    """Generation pads on the left: those rows see no key, and what they hold must not reach the others."""
    tokens, mask = padded()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = logits(fixed_half(kinds, attention), tokens, attention_mask=mask, position_ids=positions)
    assert torch.isfinite(together).all()
    alone = logits(stress(kinds, attention), tokens[:1, 5:])
    assert kl(alone, together[:1, 5:]) < CLOSE
    assert kl(logits(stress(kinds, attention), tokens[1:]), together[1:]) < CLOSE


def test_pad_tokens_weigh_exactly_nothing() -> None:
    """float16's minimum is no mask among scores of 85,000."""
    tokens, mask = padded()
    with torch.no_grad():
        weights = fixed_half(("scores",))(input_ids=tokens, attention_mask=mask, output_attentions=True).attentions
    for layer in weights:
        assert (layer[0, :, 5:, :5] == 0).all()
        assert (layer.triu(1) == 0)[:, :, 5:].all()  # rows of real tokens; a fully masked row may spread evenly


def towering(attention: str) -> Any:
    """A fixed float16 model whose masked keys score up to 1.4e6 above the others; float16's minimum hides 65504."""
    model = stress((), attention)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection, bias in ((layer.self_attn.q_proj, -2000.0), (layer.self_attn.k_proj, 2000.0)):
                projection.bias.view(-1, TINY.head_dim)[:, 0] = bias  # the fastest pair: the score turns with distance
    return qwen2_fp16_fix.fix(model.half())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_masks_hold_against_towering_scores(attention: str) -> None:
    """float16's minimum, -65504, is an ordinary number among such scores: pads and the future would get through."""
    tokens, mask = padded()
    model = towering(attention)
    before = logits(model, tokens, attention_mask=mask)
    other_pads, other_future = tokens.clone(), tokens.clone()
    other_pads[0, :5] = 9
    other_future[:, 16:] = tokens[:, 16:].flip(-1)
    assert torch.isfinite(before).all()
    assert torch.equal(before[0, 5:], logits(model, other_pads, attention_mask=mask)[0, 5:])
    after = logits(model, other_future, attention_mask=mask)
    assert not torch.equal(before[:, 16:], after[:, 16:])
    assert torch.equal(before[:, 5:16], after[:, 5:16])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_row_with_every_key_masked_is_finite(attention: str) -> None:
    tokens, mask = padded()
    assert torch.isfinite(logits(fixed_half(("scores", "residual"), attention), tokens, attention_mask=mask)).all()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kinds", [(), ("scores", "residual"), ("keys", "keys_fast")], ids="+".join)
def test_a_later_token_changes_no_earlier_logit(kinds: tuple[str, ...], attention: str) -> None:
    """inf-to-zero and clamping by a tensor's maximum leak the future into the past; bit for bit, we do not."""
    model = fixed_half(kinds, attention)
    changed = PROMPT.clone()
    changed[:, 16:] = random_prompt(TINY, batch=2, length=24, seed=1)[:, 16:]
    before, after = logits(model), logits(model, changed)
    assert not torch.equal(before[:, 16:], after[:, 16:])
    assert torch.equal(before[:, :16], after[:, :16])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_cached_steps_agree_with_one_pass(attention: str) -> None:
    """Keys are rounded into the cache once, and read back as they are."""
    model = fixed_half(("scores", "residual"), attention)
    whole = logits(model)
    with torch.no_grad():
        step = model(input_ids=PROMPT[:, :12], use_cache=True)
        rows = [step.logits]
        for index in range(12, PROMPT.shape[1]):
            so_far = {CACHE: step.past_key_values}
            step = model(input_ids=PROMPT[:, index : index + 1], use_cache=True, **so_far)
            rows.append(step.logits)
    assert kl(whole, torch.cat(rows, 1).float()) < CLOSE  # other matmul shapes, other rounding


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_prompt_in_two_parts_agrees_with_fp32(attention: str) -> None:
    """Several queries over a cache: the mask is neither square nor a single row, and its offset differs by release."""
    tokens, mask = padded()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def in_two_parts(model: Any) -> torch.Tensor:
        rows, cache = [], None
        for part in (slice(0, 10), slice(10, None)):
            inputs = {"attention_mask": mask[:, : 10 if cache is None else None], "position_ids": positions[:, part]}
            with torch.no_grad():
                step = model(input_ids=tokens[:, part], use_cache=True, **{CACHE: cache}, **inputs)
            rows, cache = [*rows, step.logits.float()], step.past_key_values
        return torch.cat(rows, 1)[:, 5:]

    kinds = ("scores", "residual")
    assert kl(in_two_parts(stress(kinds, attention)), in_two_parts(fixed_half(kinds, attention))) < CLOSE


@pytest.mark.parametrize("enabled", [True, False], ids=["windowed", "window off"])
@pytest.mark.parametrize("attention", MASKED_ATTENTIONS)
def test_a_sliding_window_is_the_one_stock_has(attention: str, enabled: bool) -> None:
    """Releases disagree on which layers have it, some even where it is off: it must come from the mask, not from us."""
    settings = {"use_sliding_window": enabled, "sliding_window": 8, "max_window_layers": 1}
    kinds = ("scores", "residual")
    oracle = logits(stress(kinds, attention, **settings))
    assert kl(oracle, logits(fixed_half(kinds, attention, **settings))) < CLOSE


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_keys_are_rotated_in_fp32_and_rounded_once(attention: str) -> None:
    """Tables or a rotation in float16 round three times more, which no KL of an ordinary model shows."""
    model = fixed_half((), attention)
    k_proj, given = model.model.layers[0].self_attn.k_proj, []
    k_proj.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    with torch.no_grad():
        found = _tensors(model(input_ids=PROMPT, use_cache=True).past_key_values)[0].double()
        projected = torch.nn.functional.linear(given[0], k_proj.weight).double() + k_proj.bias.double()
    key = projected.view(*PROMPT.shape, TINY.kv_heads, TINY.head_dim).transpose(1, 2)
    frequency = 1.0 / ROPE_THETA ** (torch.arange(0, TINY.head_dim, 2).float() / TINY.head_dim)
    angle = torch.outer(torch.arange(PROMPT.shape[1]).float(), frequency)
    cos, sin = angle.cos().double(), angle.sin().double()
    first, second = key.chunk(2, -1)
    exact = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    exact = exact + model.model.layers[0].self_attn.key_shift.double()
    once = exact.abs() * 2**-11 + key.abs().max() * 1e-6  # half a float16 step, and fp32's own error
    assert ((found - exact).abs() <= once).all()


def test_norms_round_once() -> None:
    """Stock rounds before the gain and after it."""
    model = fixed_half()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for norm in (model.model.layers[1].input_layernorm, model.model.norm):
        norm.register_forward_hook(lambda _, given, out: seen.append((given[0].double(), out)))
    logits(model)
    for norm, (given, found) in zip((model.model.layers[1].input_layernorm, model.model.norm), seen, strict=True):
        scale = torch.rsqrt(given.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        exact = norm.weight.detach().double() * given * scale
        assert found.dtype == torch.float16
        once = exact.abs() * 2**-11 * 1.001 + 2**-25  # half a float16 step, fp32's own error, subnormals
        assert ((found.double() - exact).abs() <= once).all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_keys_in_the_cache_have_the_models_dtype(attention: str) -> None:
    """An fp32 key would double the cache, and a static cache would refuse it."""
    with torch.no_grad():
        cache = fixed_half(("scores",), attention)(input_ids=PROMPT, use_cache=True).past_key_values
    tensors = _tensors(cache)
    assert len(tensors) == 2 * TINY.layers
    assert {t.dtype for t in tensors} == {torch.float16}


def _tensors(cache: Any) -> list[torch.Tensor]:
    """Every key and value in a cache: tuples up to 4.44, lists in the cache up to 4.53, layers after."""
    if isinstance(cache, tuple):
        return [tensor for layer in cache for tensor in layer]
    if hasattr(cache, "layers"):
        return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [*cache.key_cache, *cache.value_cache]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bfloat16_comes_as_close_as_sdpa(attention: str) -> None:
    """Stock bf16 eager rounds raw scores of 85,000 to steps of 512: published perplexity 7.9967 against 7.1330."""
    oracle = logits(stress(("scores",)))
    fixed = qwen2_fp16_fix.fix(stress(("scores",), attention).bfloat16())
    sdpa = kl(oracle, logits(stress(("scores",), "sdpa").bfloat16()))
    assert kl(oracle, logits(stress(("scores",)).bfloat16())) > 2 * sdpa  # stock eager is visibly worse
    assert kl(oracle, logits(fixed)) < 1.5 * sdpa  # the rest is bf16's own rounding of weights' products


@pytest.mark.parametrize("kinds", [("scores",), ("scores", "residual")], ids="+".join)
@in_one_arithmetic
def test_float16_autocast_over_fp32_weights(kinds: tuple[str, ...]) -> None:
    """As Trainer(fp16=True) runs a model: autocast casts the operands of q·kᵀ back to float16."""
    oracle = logits(stress(kinds))
    with torch.autocast("cpu", dtype=torch.float16):
        assert not torch.isfinite(logits(stress(kinds))).all()
        assert kl(oracle, logits(qwen2_fp16_fix.fix(stress(kinds)))) < CLOSE


def test_casting_after_the_fix_equals_fixing_after_the_cast() -> None:
    """The way to float16 must not matter: `model.half()` rounds RoPE frequencies in stock."""
    cast_after = qwen2_fp16_fix.fix(stress(("scores", "residual"))).half()
    assert torch.equal(logits(cast_after), logits(fixed_half(("scores", "residual"))))
