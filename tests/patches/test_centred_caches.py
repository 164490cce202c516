"""Caches of centred keys: of every kind, reused, quantised, and refused or continued where their keys are others."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import qwen2_fp16_fix
from benchmarks.workloads import CACHE
from qwen2_fp16_fix.patches.attention_form import claim_keys
from qwen2_fp16_fix.patches.caches import MARKS, STOCK
from tests.helpers import kl_to
from tests.patches.models import PROMPT, fixed, logits
from tests.stress import TINY, build, random_prompt


def generate(model: Any, tokens: Tensor = PROMPT[:1, :16], **settings: Any) -> list[int]:
    with torch.no_grad():
        found = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=12,
            pad_token_id=0,
            **{"do_sample": False, **settings},
        )
    return list(found[0].tolist())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=["dynamic", "static", "beams", "lookup"],
)
def test_every_cache_generates_the_fp32_text(settings: dict[str, Any], attention: str) -> None:
    """A centre is one vector for every key in the cache, so filling, reordering and cropping cannot tell."""
    oracle = generate(build(TINY, ("keys", "scores")), **settings)
    assert generate(fixed("keys", "scores", attention=attention), **settings) == oracle


def test_assisted_decoding_generates_the_fp32_text() -> None:
    """Draft and target each have a cache and a centre of their own."""
    oracle = generate(build(TINY, ("keys",)), assistant_model=build(TINY, ("keys",), seed=1))
    assert generate(fixed("keys"), assistant_model=fixed("keys", seed=1)) == oracle


def test_a_sliding_window_cache_generates_the_fp32_text() -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    oracle = generate(build(TINY, ("keys",), **window))
    assert generate(fixed("keys", **window)) == oracle


def test_a_prompt_cache_is_reused() -> None:
    """Copied and continued twice: the copies say whose keys they hold."""
    model = fixed("keys")
    with torch.no_grad():
        cache = model(input_ids=PROMPT[:, :20], use_cache=True).past_key_values
        rows = [model(input_ids=PROMPT[:, 20:], **{CACHE: copy.deepcopy(cache)}).logits for _ in range(2)]
    assert torch.equal(*rows)
    assert kl_to(logits(build(TINY, ("keys",)))[:, 20:], rows[0].float()) < 2e-5


def test_an_8_bit_cache_holds_centred_keys() -> None:
    """transformers' own fp8 cache: one scale for all keys, which the spike alone decides where they are not centred."""
    tokens = random_prompt(TINY, batch=1, length=208)

    def decoded(model: Any) -> Tensor:
        cache = transformers.QuantizedCache("fp8", model.config)
        logits(model, tokens[:, :192], **{CACHE: cache})
        return torch.cat([logits(model, tokens[:, i : i + 1], **{CACHE: cache}) for i in range(192, 208)], 1)

    model = build(TINY, ("keys",))
    oracle = logits(model, tokens)[:, 192:]
    stock = kl_to(oracle, decoded(model.half()))
    assert stock > 100 * kl_to(oracle, decoded(qwen2_fp16_fix.fix(model)))  # 700 times


def test_a_cache_of_another_sort_is_refused() -> None:
    """Keys with and without a centre in one cache: finite, fluent and wrong."""
    stock, model = build(TINY, ("keys",)).half(), fixed("keys")
    with torch.no_grad():
        ours = model(input_ids=PROMPT, use_cache=True).past_key_values
        with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="another dtype"):
            model.float()(input_ids=PROMPT[:, :1], **{CACHE: ours})
        full = model(input_ids=PROMPT, use_cache=True).past_key_values  # fp32 is stock's, cache and all
        assert torch.isfinite(stock.float()(input_ids=PROMPT[:, :1], **{CACHE: full}).logits).all()


def test_a_cache_of_plain_keys_is_gone_on_with() -> None:
    """A stock model's, or a prefix that PEFT has learned: 0 is a constant, too, if all keys in the cache share it."""
    tokens = random_prompt(TINY, batch=1, length=48)
    stock, model = build(TINY, ("keys",)).half(), fixed("keys")
    theirs = transformers.DynamicCache()
    logits(stock, tokens[:, :32], **{CACHE: theirs})
    ours = copy.deepcopy(theirs)
    expected = logits(stock, tokens[:, 32:40], **{CACHE: theirs}), logits(stock, tokens[:, 40:], **{CACHE: theirs})
    found = logits(model, tokens[:, 32:40], **{CACHE: ours}), logits(model, tokens[:, 40:], **{CACHE: ours})
    # 5e-4: other roundings of the 16 new keys, beside 32 that both have; 6e-2 were these centred
    assert kl_to(torch.cat(expected, 1), torch.cat(found, 1)) < 2e-3


def test_a_cache_that_turns_its_keys_gets_them_uncentred() -> None:
    """SinkCache (up to 4.52) rotates what it keeps when it moves: a centre would turn with it and be none."""

    class SinkCache:
        pass

    attention = fixed("keys", "keys_fast").model.layers[0].self_attn
    hidden, cache = torch.randn(1, 3, TINY.hidden).half(), SinkCache()
    form = claim_keys(attention, hidden, None, marks_last=False)
    assert form.shift is attention.shift
    assert form.split is attention.centre.split is not None
    form = claim_keys(attention, hidden, cache, marks_last=False)
    assert (form.shift, form.split, form.mark) == (None, None, STOCK)
    assert vars(cache)[MARKS] == {0: STOCK}


def test_an_attention_takes_the_older_name_of_its_cache() -> None:
    """Stock does until 5.40. Swallowed by **kwargs, the cache would stay empty and nothing would show it."""
    model = fixed("keys")
    hidden = torch.randn(1, 3, TINY.hidden).half()
    rotation = model.model.rotary_emb(hidden, torch.arange(3)[None])
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model.model.layers[0].self_attn(
            hidden, position_embeddings=rotation, attention_mask=None, past_key_values=cache
        )
    assert cache.get_seq_length() == 3
