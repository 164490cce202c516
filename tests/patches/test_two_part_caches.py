"""Caches of keys in two parts: all that can be wider hold them, others hold centred keys, and none holds a mixture."""

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import qwen2_fp16_fix
from benchmarks.workloads import CACHE
from qwen2_fp16_fix.patches import attention_form, cache_origin, cached_keys, numerics
from tests.helpers import Logits, kl_to
from tests.patches.models import attentions, by_growing_the_batch, by_pickle, fixed, logits
from tests.stress import TINY, build, random_prompt

KINDS = ("keys_fast",)
PROMPT = random_prompt(TINY, batch=2, length=96)
FIRST = 64
WIDTH = TINY.head_dim + 8  # two pairs
FLOOR = 2e-6  # KL to fp32 in nats: two parts are at 6e-7
CENTRED = 1e-5, 1e-3  # centred keys are at 4e-5 to 2e-4, stock's at 1e-2


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own."""
    monkeypatch.setattr(cache_origin, "TRACED", [])


@functools.cache
def oracle(length: int = PROMPT.shape[1]) -> Tensor:
    return logits(build(TINY, KINDS), PROMPT[:, :length])


def widths(cache: Any) -> set[int]:
    """Of the keys and the values of the first layer, whose spikes ask for two parts."""
    return {cache.layers[0].keys.shape[-1], cache.layers[0].values.shape[-1]}


def decoded(model: Any, cache: Any, *cuts: int, tokens: Tensor = PROMPT, **inputs: Any) -> Tensor:
    """The logits of the prompt, in pieces over a cache."""
    edges = [0, *cuts, tokens.shape[1]]
    pieces = [tokens[:, start:end] for start, end in itertools.pairwise(edges)]
    return torch.cat([logits(model, piece, **{CACHE: cache}, **inputs) for piece in pieces], 1)


IN_PIECES = (FIRST, FIRST + 1, FIRST + 2, 80)
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}


def dynamic(model: Any) -> Any:
    return transformers.DynamicCache()


def configured(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


def static(model: Any) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=128)


@pytest.fixture(params=["a CPU's", "a GPU's"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "a GPU's":
        monkeypatch.setattr(numerics, "runs_on_cpu", lambda tensor: False)
    return str(request.param)


# --- wide ---


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [dynamic, configured, static])
def test_decoding_equals_prefill_in_every_cache_that_can_be_wider(make: Callable[[Any], Any], attention: str) -> None:
    model = fixed(*KINDS, attention=attention)
    cache = make(model)
    found = decoded(model, cache, *IN_PIECES)
    assert widths(cache) == {WIDTH}
    assert kl_to(oracle(), found) < FLOOR
    assert kl_to(logits(model, PROMPT), found) < FLOOR
    assert qwen2_fp16_fix.status(model).model.ranges[0].pairs_in_two_parts == 2


@pytest.mark.parametrize("make", [configured, static])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sliding_windows_are_wider_too(make: Callable[[Any], Any], attention: str) -> None:
    model = fixed(*KINDS, attention=attention, **WINDOW)
    cache = make(model)
    found = decoded(model, cache, *IN_PIECES)
    assert widths(cache) == {WIDTH}
    assert kl_to(logits(build(TINY, KINDS, **WINDOW), PROMPT), found) < FLOOR


def by_reordering(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache


def by_cropping(cache: Any) -> Any:
    cache.crop(-8)
    return cache


def by_emptying(cache: Any) -> Any:
    cache.crop(-FIRST)
    return cache


WAYS = [copy.deepcopy, by_pickle, by_reordering, by_growing_the_batch, by_cropping, by_emptying]


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_that_is_copied_or_cut_stays_wide(way: Callable[[Any], Any]) -> None:
    model, cache = fixed(*KINDS, attention="sdpa"), dynamic(None)
    decoded(model, cache, tokens=PROMPT[:, :FIRST])
    cache = way(cache)
    rest = PROMPT[:, cache.get_seq_length() :]
    found = decoded(model, cache, 1, tokens=rest)
    assert widths(cache) == {WIDTH}
    assert kl_to(oracle()[:, -found.shape[1] :], found) < FLOOR


@torch.no_grad()
def generated(model: Any, **settings: Any) -> Any:
    """What `generate` returns: twelve new tokens, and the logits of each step."""
    return model.generate(
        input_ids=PROMPT[:1, :24],
        attention_mask=torch.ones(1, 24, dtype=torch.long),
        max_new_tokens=12,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        do_sample=False,
        **settings,
    )


def assistant(make: Callable[..., Any]) -> dict[str, Any]:
    return {"assistant_model": make(*KINDS, seed=1)}


WAYS_TO_GENERATE: dict[str, Callable[[Callable[..., Any]], dict[str, Any]]] = {
    "dynamic": lambda make: {},
    "static": lambda make: {"cache_implementation": "static"},
    "chunked": lambda make: {"prefill_chunk_size": 7},
    "beams": lambda make: {"num_beams": 3},
    "static beams": lambda make: {"num_beams": 3, "cache_implementation": "static"},
    "assisted": assistant,
    "lookup": lambda make: {"prompt_lookup_num_tokens": 3},
}


def stock(*kinds: str, attention: str = "sdpa", seed: int = 0) -> Any:
    return build(TINY, kinds, seed=seed, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("way", WAYS_TO_GENERATE)
def test_every_way_to_generate_is_at_the_floor(way: str, attention: str) -> None:
    settings = WAYS_TO_GENERATE[way]
    make = functools.partial(stock, attention=attention)
    expected = generated(make(*KINDS), **settings(make))
    ours = functools.partial(fixed, attention=attention)
    found = generated(fixed(*KINDS, attention=attention), **settings(ours))
    assert torch.equal(found.sequences, expected.sequences)
    assert kl_to(torch.stack(expected.logits), torch.stack(found.logits)) < FLOOR


# --- narrow ---


class OwnCache(transformers.DynamicCache):
    """Of another module: nothing is known of what it does with tensors."""


def told_beforehand(model: Any) -> Any:
    cache = static(model)
    cache.early_initialization(2, TINY.kv_heads, TINY.head_dim, torch.float16, torch.device("cpu"))
    return cache


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [lambda model: OwnCache(), told_beforehand], ids=["own class", "allocated"])
def test_other_caches_hold_centred_keys(make: Callable[[Any], Any], attention: str) -> None:
    model = fixed(*KINDS, attention=attention)
    cache = make(model)
    found = decoded(model, cache, *IN_PIECES)
    assert widths(cache) == {TINY.head_dim}
    assert CENTRED[0] < kl_to(oracle(), found) < CENTRED[1]
    row = qwen2_fp16_fix.status(model).model.ranges[0]
    assert (row.keys, row.pairs_in_two_parts, row.pairs_left) == ("centred", 0, 2)
    assert type(cache).__name__ in str(row.why_left)
    logits(model, PROMPT)
    assert qwen2_fp16_fix.status(model).model.ranges[0].pairs_in_two_parts == 2  # as the last forward stored them


def test_a_quantised_cache_holds_centred_keys() -> None:
    """8 bits: what they cost is far more than what is won. Wide keys made most of them worse."""
    model = fixed(*KINDS, attention="sdpa")
    cache = transformers.QuantizedCache("fp8", model.config)
    found = decoded(model, cache, *IN_PIECES)
    assert cached_keys.stored_width(attentions(model)[0], cache) == TINY.head_dim
    assert torch.isfinite(found).all()
    assert qwen2_fp16_fix.status(model).model.ranges[0].pairs_in_two_parts == 0
    centred = fixed(*KINDS, attention="sdpa")
    for each in attentions(centred):
        each.keep_centre(each.centre._replace(split=None, version=1))
    assert torch.equal(found, decoded(centred, transformers.QuantizedCache("fp8", model.config), *IN_PIECES))


QUANTISED = ["QuantizedCache", "HQQQuantizedCache", "QuantoQuantizedCache", "QuantizedLayer", "SinkCache"]


@pytest.mark.parametrize("name", QUANTISED)
def test_caches_of_other_releases_are_known_by_name(name: str) -> None:
    kind = type(name, (), {"__module__": "transformers.cache_utils"})
    assert not cached_keys.has_plain_tensors(kind)
    assert not cached_keys.has_plain_tensors(type("Mine", (kind,), {"__module__": "transformers.cache_utils"}))
    plain = type("DynamicCache", (), {"__module__": "transformers.cache_utils"})
    assert cached_keys.has_plain_tensors(plain)
    assert not cached_keys.has_plain_tensors(type("Mine", (plain,), {"__module__": "mine"}))


def test_a_static_cache_that_is_filled_in_chunks_is_allocated_by_head_dim() -> None:
    """transformers tells it the shape before the first key; wide keys would raise."""
    settings = {"cache_implementation": "static", "prefill_chunk_size": 7}
    expected, found = generated(stock(*KINDS)), generated(fixed(*KINDS, attention="sdpa"), **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert kl_to(torch.stack(expected.logits), torch.stack(found.logits)) < CENTRED[1]
    assert widths(found.past_key_values) == {TINY.head_dim}


def cut(cache: Any) -> Any:
    """What a tool that knows head_dim makes of it."""
    pairs = [(layer.keys[..., : TINY.head_dim], layer.values[..., : TINY.head_dim]) for layer in cache.layers]
    return transformers.DynamicCache(pairs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_cache_that_was_cut_to_head_dim_is_gone_on_with(attention: str) -> None:
    """The first channels alone are centred keys, and are adopted as such."""
    model, cache = fixed(*KINDS, attention=attention), dynamic(None)
    decoded(model, cache, tokens=PROMPT[:, :FIRST])
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="adopt_cache"):
        decoded(model, cut(cache), tokens=PROMPT[:, FIRST:])
    narrow = qwen2_fp16_fix.adopt_cache(cut(cache), model)
    found = decoded(model, narrow, 1, tokens=PROMPT[:, FIRST:])
    assert widths(narrow) == {TINY.head_dim}
    assert CENTRED[0] < kl_to(oracle()[:, FIRST:], found) < CENTRED[1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_wide_cache_in_a_stock_model_raises(attention: str) -> None:
    cache = dynamic(None)
    decoded(fixed(*KINDS, attention=attention), cache, tokens=PROMPT[:, :FIRST])
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        logits(build(TINY, KINDS, attn_implementation=attention).half(), PROMPT[:, FIRST:], **{CACHE: cache})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_stock_models_cache_is_gone_on_with_as_it_is(attention: str) -> None:
    """As near as stock's own numbers in it allow."""
    model, half, cache = (
        fixed(*KINDS, attention=attention),
        build(TINY, KINDS, attn_implementation="sdpa").half(),
        dynamic(None),
    )
    decoded(half, cache, tokens=PROMPT[:, :FIRST])
    theirs = decoded(half, copy.deepcopy(cache), 1, tokens=PROMPT[:, FIRST:])
    ours = decoded(model, cache, 1, tokens=PROMPT[:, FIRST:])
    assert widths(cache) == {TINY.head_dim}
    assert kl_to(oracle()[:, FIRST:], ours) < 1.5 * kl_to(oracle()[:, FIRST:], theirs)


def test_another_number_of_pairs_is_refused() -> None:
    """A marked cache of the same version cannot be; one that says nothing and is adopted can."""
    model, cache = fixed(*KINDS), dynamic(None)
    decoded(model, cache, tokens=PROMPT[:, :FIRST])
    for layer in cache.layers:
        layer.keys, layer.values = (nn.functional.pad(x, (0, 4)) for x in (layer.keys, layer.values))
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="cannot be"):
        decoded(model, cache, tokens=PROMPT[:, FIRST:])


def test_a_wide_cache_without_marks_is_asked_about_where_there_is_no_centre_to_speak_of() -> None:
    """It was taken for a stock model's, and torch raised: nothing of the bias is in pairs that do not turn."""
    exact = build(TINY, ())
    with torch.no_grad():
        for each in attentions(exact):
            each.k_proj.bias.zero_().view(-1, TINY.head_dim)[:, 0] = 100
    model, cache = qwen2_fp16_fix.fix(copy.deepcopy(exact).half()), dynamic(None)
    decoded(model, cache, tokens=PROMPT[:, :FIRST])
    del cache.__dict__["qwen2_fp16_marks"]
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="adopt_cache"):
        decoded(model, cache, tokens=PROMPT[:, FIRST:])
    found = decoded(model, qwen2_fp16_fix.adopt_cache(cache, model), tokens=PROMPT[:, FIRST:])
    assert kl_to(logits(exact, PROMPT)[:, FIRST:], found) < FLOOR


# --- implementations ---


def registered(monkeypatch: pytest.MonkeyPatch, seen: list[int], name: str = "mine") -> None:
    def mine(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append(key.shape[-1])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, mine)


def test_an_implementation_of_somebody_else_gets_heads_of_head_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even in the place of transformers' own."""
    seen: list[int] = []
    model = fixed(*KINDS, attention="sdpa")
    registered(monkeypatch, seen)
    model.config._attn_implementation = "mine"
    assert CENTRED[0] < kl_to(oracle(), logits(model, PROMPT)) < CENTRED[1]
    assert {*seen} == {TINY.head_dim}
    assert "mine" in str(qwen2_fp16_fix.status(model).model.ranges[0].why_left)


def test_an_implementation_of_somebody_else_is_handed_no_wide_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was filled before the user chose it."""
    model, cache = fixed(*KINDS, attention="sdpa"), dynamic(None)
    decoded(model, cache, tokens=PROMPT[:, :FIRST])
    registered(monkeypatch, [])
    model.config._attn_implementation = "mine"
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="'mine', which is not transformers' own"):
        decoded(model, cache, tokens=PROMPT[:, FIRST:])


@pytest.mark.parametrize(
    ("name", "width", "pads", "taken"),
    [
        ("eager", 264, True, True),
        ("sdpa", 264, True, True),
        ("flash_attention_2", 136, True, True),
        ("flash_attention_2", 256, True, True),
        ("flash_attention_2", 264, True, False),
        ("flash_attention_4", 128, True, True),
        ("flash_attention_4", 136, False, False),
        ("kernels-community/flash-attn4", 136, False, False),
        ("flex_attention", 136, False, True),
        ("flex_attention", 136, True, False),
        ("paged|sdpa", 136, False, False),
        ("unknown of an older release", 136, False, True),
    ],
)
def test_which_implementations_take_wider_heads(name: str, width: int, pads: bool, taken: bool) -> None:
    """flex on a GPU pads 136 channels to 256; flash kernels end there; a paged cache is allocated by head_dim.

    The fourth flash ends at 128 on Blackwell, with 256 and a few pairs of widths as exceptions.
    """
    assert (attention_form.why_not_wider(name, width, pads) is None) == taken


@pytest.mark.filterwarnings(
    "ignore:_compile flag on create_block_mask", "ignore:.torch.jit.script_method. is deprecated"
)
def test_flex_attention_gets_wide_keys_on_a_cpu() -> None:
    model = fixed(*KINDS, attention="flex_attention")
    assert kl_to(oracle(), logits(model, PROMPT)) < FLOOR


# --- what attention promises ---


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_token_sees_a_later_one(attention: str) -> None:
    """Bit for bit."""
    model, other = fixed(*KINDS, attention=attention), PROMPT.clone()
    other[:, 50:] = (other[:, 50:] + 1) % TINY.vocab
    first, second = logits(model, PROMPT), logits(model, other)
    assert torch.equal(first[:, :50], second[:, :50])
    assert not torch.equal(first[:, 50:], second[:, 50:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_are_independent_and_padding_hides(attention: str) -> None:
    """The first row padded on the left, and whatever is in the pads and in the other row."""
    model = fixed(*KINDS, attention=attention)
    mask = torch.ones_like(PROMPT)
    mask[0, :20] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    other = PROMPT.clone()
    other[0, :20] = 7
    first, second = logits(model, PROMPT, **inputs), logits(model, other, **inputs)
    assert torch.equal(first[0, 20:], second[0, 20:])
    assert torch.equal(first[1], second[1])
    exact = logits(build(TINY, KINDS), PROMPT, **inputs)
    assert kl_to(exact[0, 20:], first[0, 20:]) < FLOOR
    assert kl_to(exact[1], first[1]) < FLOOR
    cache = dynamic(None)
    pieces = [
        logits(
            model,
            PROMPT[:, s],
            attention_mask=mask[:, : s.stop],
            position_ids=inputs["position_ids"][:, s],
            **{CACHE: cache},
        )
        for s in (slice(0, FIRST), slice(FIRST, FIRST + 1), slice(FIRST + 1, PROMPT.shape[1]))
    ]
    assert kl_to(exact[0, 20:], torch.cat(pieces, 1)[0, 20:]) < FLOOR


# --- gradients, graphs and copies ---


def gradients(model: Any, checkpointing: bool = False) -> Tensor:
    """Of the projections and biases of queries and keys in the layers with spikes."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    model.zero_grad()
    (model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss.float() * 256).backward()
    linears = [getattr(attentions(model)[i], name) for i in (0, -1) for name in ("q_proj", "k_proj")]
    return torch.cat([p.grad.float().flatten() / p.grad.float().norm() for x in linears for p in x.parameters()])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_are_those_of_fp32(attention: str, checkpointing: bool) -> None:
    """Each weight's and bias's for itself: none may be lost in the parts. What is lost by centring alone: 3e-2."""
    expected = gradients(build(TINY, KINDS, attn_implementation=attention), checkpointing)
    found = gradients(fixed(*KINDS, attention=attention), checkpointing)
    assert torch.isfinite(found).all()
    assert float((found - expected).norm() / expected.norm()) < 3e-2


def test_bits_cut_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code takes the upper part by its bits, which autograd cannot see through."""
    plain = gradients(fixed(*KINDS, attention="sdpa"))
    monkeypatch.setattr("qwen2_fp16_fix.patches.two_part_keys.torch.compiler.is_compiling", lambda: True)
    assert float((gradients(fixed(*KINDS, attention="sdpa")) - plain).norm() / plain.norm()) < 1e-2


@pytest.mark.parametrize("way", [copy.deepcopy, by_pickle])
def test_a_copied_model_has_its_pairs(way: Callable[[Any], Any]) -> None:
    model = fixed(*KINDS, attention="sdpa")
    other = way(model)
    assert torch.equal(logits(model, PROMPT), logits(other, PROMPT))
    cache = dynamic(None)
    decoded(model, cache, tokens=PROMPT[:, :FIRST])
    assert kl_to(oracle()[:, FIRST:], decoded(other, cache, tokens=PROMPT[:, FIRST:])) < FLOOR


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # torch reads every attribute
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("how", ["export", "trace"])
def test_an_exported_model_has_its_pairs(how: str, attention: str) -> None:
    model = Logits(fixed(*KINDS, attention=attention))
    with torch.no_grad():
        if how == "export":
            found = torch.export.export(model, (PROMPT,)).module()(PROMPT)
        else:
            found = torch.jit.trace(model, (PROMPT,), check_trace=False)(PROMPT)
    assert kl_to(oracle(), found.float()) < FLOOR
