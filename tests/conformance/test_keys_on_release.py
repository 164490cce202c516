"""Keys in two parts: as exact as keys that are never rounded, over every cache that takes their width."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import qwen2_fp16_fix
from qwen2_fp16_fix.patches.cached_keys import stored_keys
from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import RANGE
from qwen2_fp16_fix.patches.version_map import DIFFERENCES
from tests.conformance.models import (
    ATTENTIONS,
    CACHE,
    PROMPT,
    RELEASE,
    SDPA_MASKS_RAISE,
    SDPA_SCORES_ARE_FP32,
    Version,
    fixed_half,
    generate,
    kl,
    logits,
    static_cache,
    stress,
)
from tests.stress import TINY

pytestmark = pytest.mark.usefixtures("arithmetic")

#: Spikes in pairs that turn. At base 1e4, that of Qwen2.5-Math, all pairs do.
SPIKES = (("keys_fast", 1e6), ("keys_fast", 1e4), ("keys", 1e4))

#: KL to fp32 of keys that are never rounded: they are at 6e-7 to 8e-7 here, and keys rounded once at 4e-5 to 5e-3.
EXACT = 2e-6
CENTRED = 2e-4  # of keys_fast at 1e6, rounded once after centring: 4e-5 to 1.5e-4

FIRST = 20  # tokens of the prompt that are in the cache before single ones follow

#: Static caches up to 4.55 have the shape that the configuration says. Tuples of tensors are caches up to 4.47.
CACHES = ["dynamic"]
CACHES += ["static"] if Version("4.45") <= RELEASE else []
CACHES += ["tuple"] if RELEASE < Version("4.48") else []
STATIC_IS_NARROW = RELEASE < Version("4.56")


def new_cache(model: Any, kind: str) -> Any:
    if kind == "tuple":
        return None
    return static_cache(model) if kind == "static" else DynamicCache()


def in_steps(model: Any, kind: str) -> tuple[Tensor, Any]:
    """Logits of the prompt, its last tokens one by one over a cache, and the cache in the end."""
    cache, rows, start = new_cache(model, kind), [], 0
    for end in range(FIRST, PROMPT.shape[1] + 1):
        inputs: dict[str, Any] = {CACHE: cache, "use_cache": True}
        if Version("4.45") <= RELEASE < Version("5.4"):
            inputs["cache_position"] = torch.arange(start, end)
        with torch.no_grad():
            step = model(input_ids=PROMPT[:, start:end], **inputs)
        rows.append(step.logits.float())
        cache, start = step.past_key_values, end
    return torch.cat(rows, 1), cache


def width(model: Any, cache: Any) -> int:
    """Of the keys of the first layer, which has spikes."""
    keys = cache[0][0] if isinstance(cache, tuple) else stored_keys(cache, 0)
    assert keys is not None
    return int(keys.shape[-1])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(("kind", "base"), SPIKES, ids=str)
def test_a_spike_that_turns_costs_nothing(kind: str, base: float, attention: str) -> None:
    """A constant centre cannot follow it: KL 4e-5 to 5e-3, where all else was at 6e-7."""
    oracle = logits(stress((kind,), attention, rope_theta=base))
    assert kl(oracle, logits(fixed_half((kind,), attention, rope_theta=base))) < EXACT
    if attention == "eager" or SDPA_SCORES_ARE_FP32:  # else it may be NaN
        assert kl(oracle, logits(stress((kind,), attention, rope_theta=base).half())) > 100 * EXACT


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_decoding_over_a_cache_equals_one_pass(attention: str, cache: str) -> None:
    """A cache that takes their width stores both parts; another one stores centred keys, as ever."""
    if attention == "sdpa" and cache == "static" and SDPA_MASKS_RAISE:
        with pytest.raises(RuntimeError, match="written-to tensor"):
            in_steps(stress((), "sdpa"), "static")
        return
    narrow = cache == "static" and STATIC_IS_NARROW
    kind, base = SPIKES[0] if narrow else SPIKES[1]
    model = fixed_half((kind,), attention, rope_theta=base)
    found, filled = in_steps(model, cache)
    assert (width(model, filled) == TINY.head_dim) == narrow
    bound = CENTRED if narrow else EXACT
    assert kl(logits(stress((kind,), attention, rope_theta=base)), found) < bound
    assert kl(logits(model), found) < bound
    if not narrow:  # two float16 steps of a logit between 4 and 8: other matmul shapes, other rounding
        assert float((logits(model) - found).abs().max()) < 2 * 2**-8 * 1.01


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_beams_say_what_fp32_says(attention: str) -> None:
    """Beams reorder, repeat and drop rows of wide keys."""
    kinds, base = ("keys_fast",), 1e4
    expected = generate(stress(kinds, attention, rope_theta=base), num_beams=3)
    assert torch.equal(generate(fixed_half(kinds, attention, rope_theta=base), num_beams=3), expected)


def stored(model: Any, name: str) -> int | str:
    """How many tokens are in a cache that an attention is handed by this name; an error's class if it takes none."""
    cache, attention = DynamicCache(), model.model.layers[0].self_attn
    hidden = torch.zeros(1, 5, TINY.hidden, dtype=model.dtype)
    positions = torch.arange(5)[None]
    inputs: dict[str, Any] = {"position_ids": positions}
    if Version("4.48") <= RELEASE:
        inputs = {"position_embeddings": model.model.rotary_emb(hidden, positions), "attention_mask": None}
    try:
        with torch.no_grad():
            attention(hidden, **inputs, **{name: cache})
    except TypeError as error:
        return type(error).__name__
    return int(cache.get_seq_length())


@pytest.mark.filterwarnings("ignore:.past_key_values?. is deprecated")
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_cache_is_filled_by_whichever_name_stock_takes(attention: str) -> None:
    """Stock takes older names of the argument through a decorator, which a forward of ours does not have."""
    names = ("past_key_value", "past_key_values", "cache")
    stock = {name: stored(stress((), attention), name) for name in names}
    assert stock[DIFFERENCES[RANGE.module].cache_argument] == 5
    fixed = {name: stored(fixed_half((), attention), name) for name in names}
    assert {name for name in names if fixed[name] == 5} >= {name for name in names if stock[name] == 5}


def test_every_spike_is_split_and_said_to_be() -> None:
    """Or the tests above would not be about split keys."""
    for kind, base in SPIKES:
        rows = qwen2_fp16_fix.status(fixed_half((kind,), rope_theta=base)).model.ranges
        assert rows[0].pairs_in_two_parts > 0 < rows[-1].pairs_in_two_parts
        assert not any(row.pairs_left for row in rows)
