"""Whose keys a cache holds: what is measured, on which caches, what is asked of the user, and PEFT's prefixes."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.integrations import executorch

import qwen2_fp16_fix
from benchmarks.workloads import CACHE
from qwen2_fp16_fix.patches import cache_origin, caches
from tests.helpers import kl_to
from tests.patches.models import by_growing_the_batch, by_pickle
from tests.stress import KINDS, TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=2, length=48)
FIRST = 32
CLOSE = 2e-5  # KL to fp32 in nats: float16's own 1e-6, and room


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own."""
    monkeypatch.setattr(cache_origin, "TRACED", [])


def fixed(*kinds: str, dtype: torch.dtype = torch.float16, **settings: Any) -> Any:
    return qwen2_fp16_fix.fix(build(TINY, kinds, attn_implementation="sdpa", **settings).to(dtype))


@torch.no_grad()
def logits(model: Any, tokens: Tensor = PROMPT, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=tokens, **inputs).logits
    return found.float()


def filled(model: Any, cache: Any = None, tokens: Tensor = PROMPT[:, :FIRST], **inputs: Any) -> Any:
    """A cache, a dynamic one if none is given, that holds keys of the first tokens."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits(model, tokens, **{CACHE: cache}, **inputs)
    return cache


def rest(model: Any, cache: Any) -> Tensor:
    return logits(model, PROMPT[:, FIRST:], **{CACHE: cache})


def unmarked(cache: Any) -> Any:
    """The cache without its marks, as any way of losing them leaves it."""
    del cache.__dict__[caches.MARKS]
    return cache


def marks(cache: Any) -> set[Any]:
    """The marks of its layers, and nothing that is kept beside them."""
    return {mark for layer, mark in cache.__dict__[caches.MARKS].items() if isinstance(layer, int)}


def own_marks(model: Any) -> set[Any]:
    """What the model marks an empty cache with."""
    return {caches.own_mark(layer.self_attn.centre, layer.self_attn.ranges) for layer in model.model.layers}


def measured(model: Any, cache: Any) -> float:
    along, centre, _ = cache_origin.measure(cache, tuple(model.model.layers[0].self_attn.witnesses.values()))
    return along / centre


# --- what is measured ---


@pytest.mark.parametrize("base", [1e4, 1e6])
@pytest.mark.parametrize("length", [1, 5, 48, 400])
@pytest.mark.parametrize("kinds", [(), ("keys",), ("keys_fast",), ("scores",), ("massive",), KINDS], ids="+".join)
def test_keys_show_whether_they_are_centred(kinds: tuple[str, ...], length: int, base: float) -> None:
    """0 and 1 within a quarter, from a single token on, spikes or not; the farthest is one token of massive channels.

    bf16 keys, as float16 ones overflow in stock before they are stored.
    """
    tokens = random_prompt(TINY, batch=1, length=length)
    stock = build(TINY, kinds, attn_implementation="sdpa", rope_theta=base).bfloat16()
    model = qwen2_fp16_fix.fix(copy.deepcopy(stock))
    assert abs(measured(model, filled(stock, tokens=tokens)) - 1) < cache_origin.NEAR
    assert abs(measured(model, filled(model, tokens=tokens))) < cache_origin.NEAR


@pytest.mark.parametrize("std", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("marks_last", [True, False])
def test_a_short_centre_is_not_taken_for_a_stock_models_cache(std: float, marks_last: bool) -> None:
    """Keys that have more in common than their bias gave measures from -2 to 20, and were taken for a stock model's."""
    stock = build(TINY, ())
    with torch.no_grad():
        for layer in stock.model.layers:
            layer.self_attn.k_proj.weight.mul_(20)
            layer.self_attn.k_proj.bias.normal_(std=std)
    model = qwen2_fp16_fix.fix(stock.half())
    witnesses = tuple(model.model.layers[0].self_attn.witnesses.values())
    cache = filled(model, tokens=PROMPT)
    if marks_last:
        with pytest.raises(qwen2_fp16_fix.ForeignCacheError):
            cache_origin.look_ours(cache, witnesses, marks_last, differs=False)
    else:  # where transformers itself rebuilds caches
        assert cache_origin.look_ours(cache, witnesses, marks_last, differs=False)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_plan_made_anew_keeps_the_centre(kind: str) -> None:
    """These variants change their frequencies as a prompt grows; the keys in a cache have the first ones' centre."""
    rope = {"rope_type": kind, "rope_theta": 1e6, "factor": 4.0}
    if kind == "longrope":
        pairs = TINY.head_dim // 2
        rope |= {"short_factor": [1.0] * pairs, "long_factor": [3.0] * pairs, "original_max_position_embeddings": 24}
    model = fixed("keys", rope_parameters=rope, max_position_embeddings=FIRST)
    shifts = [layer.self_attn.shift.clone() for layer in model.model.layers]
    logits(model, random_prompt(TINY, batch=1, length=2 * FIRST))
    qwen2_fp16_fix.fix(model)
    assert all(
        torch.equal(layer.self_attn.shift, shift) for layer, shift in zip(model.model.layers, shifts, strict=True)
    )


def test_compiled_code_reads_the_mark() -> None:
    """`adopt_cache(…, centred=False)` was believed by eager code alone."""
    torch._dynamo.reset()
    stock, model = build(TINY, ("keys",), attn_implementation="sdpa").half(), fixed("keys")
    model.set_attn_implementation("sdpa")
    found = []
    for run in (model, torch.compile(model, backend="eager")):
        cache = filled(stock, tokens=PROMPT[:, :FIRST])
        qwen2_fp16_fix.adopt_cache(cache, model, centred=False)
        with torch.no_grad():
            found.append(run(input_ids=PROMPT[:, FIRST:], **{CACHE: cache}).logits.float())
    assert kl_to(*found) < 1e-6  # a compiler takes addcmul apart: fp32 roundings of its own


def test_keys_are_added_up_in_fp32() -> None:
    """300 in each of 2 times 256 tokens is past float16's range."""
    tokens = random_prompt(TINY, batch=2, length=400)
    stock, model = build(TINY, ("keys",), attn_implementation="sdpa").half(), fixed("keys")
    assert abs(measured(model, filled(stock, tokens=tokens)) - 1) < 0.01
    assert abs(measured(model, filled(model, tokens=tokens))) < 0.01


def test_pads_have_keys_too() -> None:
    """They hold a bias like any other; what says whose they are is not diluted."""
    mask = torch.ones_like(PROMPT[:, :FIRST])
    mask[0, :20] = 0
    stock, model = build(TINY, ()).half(), fixed()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for filler, expected in ((stock, 1), (model, 0)):
        cache = filled(filler, attention_mask=mask, position_ids=positions)
        assert abs(measured(model, cache) - expected) < cache_origin.NEAR


def test_the_longest_centres_decide_for_all_layers() -> None:
    """One layer alone may look like anything where its centre is short; the cache is one thing or the other."""
    model = fixed("keys")
    cache = filled(model)
    with torch.no_grad():
        for layer in cache.layers[1:3]:  # spikes are in the first and the last
            layer.keys.add_(-model.model.layers[1].self_attn.key_shift.half())
    assert abs(measured(model, cache)) < 0.01


# --- ways of losing a mark, and of keeping it ---


def by_constructor(cache: Any) -> Any:
    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


def by_tree_map(cache: Any) -> Any:
    executorch.register_dynamic_cache_export_support()
    return pytree.tree_map(lambda tensor: tensor.clone(), cache)


def by_file(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save([(layer.keys, layer.values) for layer in cache.layers], file)
    file.seek(0)
    return DynamicCache(torch.load(file))


@pytest.mark.parametrize("way", [by_constructor, by_tree_map, by_file])
def test_a_cache_that_lost_its_mark_is_asked_about(way: Callable[[Any], Any]) -> None:
    """Every way there is: old keys were centred, new ones were not, and nothing showed it."""
    model = fixed("keys")
    oracle = logits(build(TINY, ("keys",)))[:, FIRST:]
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="adopt_cache"):
        rest(model, way(filled(model)))
    assert kl_to(oracle, rest(model, qwen2_fp16_fix.adopt_cache(way(filled(model)), model))) < CLOSE


def by_reordering(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([0, 1]))
    return cache


def by_cropping(cache: Any) -> Any:
    cache.crop(-4)
    return cache


@pytest.mark.parametrize("way", [copy.deepcopy, by_pickle, by_reordering, by_growing_the_batch, by_cropping])
def test_a_cache_that_kept_its_mark_is_not(way: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything measured, which would wait for the GPU."""
    monkeypatch.setattr(
        cache_origin, "measure", lambda *_: pytest.fail("measured a cache that says whose keys it holds")
    )
    model = fixed("keys")
    cache = way(filled(model))
    found = logits(model, PROMPT[:, cache.get_seq_length() :], **{CACHE: cache})
    assert kl_to(logits(build(TINY, ("keys",)))[:, -found.shape[1] :], found) < CLOSE


def crop(cache: Any) -> None:
    cache.crop(-FIRST)


def reset(cache: Any) -> None:
    cache.reset()


@pytest.mark.parametrize("empty", [crop, reset])
def test_an_emptied_cache_takes_either(empty: Callable[[Any], Any]) -> None:
    """Nothing in it can be mixed up with what comes."""
    model, exact = fixed("keys"), qwen2_fp16_fix.fix(build(TINY, ("keys",)))
    first, oracle = PROMPT[:, :FIRST], logits(exact)[:, :FIRST]
    cache = filled(model)
    empty(cache)
    assert kl_to(oracle, logits(exact, first, **{CACHE: cache})) < CLOSE  # fp32 is stock's
    cache = qwen2_fp16_fix.adopt_cache(DynamicCache(), model, centred=False)
    filled(model, cache)
    assert marks(cache) == own_marks(model)  # it was empty from the start
    qwen2_fp16_fix.adopt_cache(cache, model, centred=False)
    empty(cache)
    assert kl_to(oracle, logits(model, first, **{CACHE: cache})) < CLOSE
    assert marks(cache) == own_marks(model)


def test_an_emptied_static_cache_takes_either() -> None:
    """It holds zeros then. Full, it is refused, as any other."""
    model = fixed("keys")
    full, emptied = filled(model, static(model)), filled(model, static(model))
    emptied.reset()
    for layer in model.model.layers:
        layer.self_attn.keep_centre(None)
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="another state of the fix"):
        rest(model, full)
    assert torch.isfinite(filled(model, emptied).layers[0].keys).all()
    assert marks(emptied) == {caches.STOCK}


# --- sorts of caches ---


def static(model: Any) -> Any:
    return transformers.StaticCache(model.config, max_cache_len=64)


def quantised(model: Any) -> Any:
    return transformers.QuantizedCache("fp8", model.config)


SORTS = {"dynamic": None, "static": static, "fp8": quantised}


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("filler", ["stock", "fixed"])
def test_every_sort_of_cache_is_measured(filler: str, sort: str) -> None:
    """Where a static cache is not filled it holds zeros; a quantised one holds other numbers than keys."""
    stock, model = build(TINY, ("scores",), attn_implementation="sdpa").half(), fixed("scores")
    make = SORTS[sort]
    cache = filled(stock if filler == "stock" else model, None if make is None else make(model))
    cache.__dict__.pop(caches.MARKS, None)
    if filler == "fixed":
        with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="adopt_cache"):
            rest(model, cache)
    else:
        found = rest(model, cache)
        assert marks(cache) == {caches.STOCK}
        assert torch.isfinite(found).all()


def test_a_sliding_windows_cache_is_measured() -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    model = fixed("keys", **window)
    cache = unmarked(filled(model))
    assert cache.layers[0].keys.shape[-2] < FIRST
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="adopt_cache"):
        rest(model, cache)


def test_a_fresh_static_cache_is_not_taken_for_a_full_one() -> None:
    """Allocated beforehand, it holds zeros that are nobody's keys."""
    model = fixed("keys")
    cache = static(model)
    cache.early_initialization(2, TINY.kv_heads, TINY.head_dim, torch.float16, torch.device("cpu"))
    filled(model, cache)
    assert marks(cache) == own_marks(model)


def test_a_model_without_centres_to_speak_of_goes_on() -> None:
    """Biases of 0, as every new model has, or below what float16 rounds off its keys: then it is all the same."""
    for size in (0.0, 1e-5):
        stock = build(TINY, ()).half()
        with torch.no_grad():
            for layer in stock.model.layers:
                layer.self_attn.k_proj.bias.mul_(size)
        oracle = logits(copy.deepcopy(stock).float())[:, FIRST:]
        model = qwen2_fp16_fix.fix(copy.deepcopy(stock))
        for filler in (stock, model):
            cache = filled(filler)
            cache.__dict__.pop(caches.MARKS, None)
            assert kl_to(oracle, rest(model, cache)) < CLOSE


def test_keys_with_half_of_a_centre_are_refused() -> None:
    """Half of a centre taken off: neither a stock model's nor ours."""
    model = fixed("keys")
    cache = unmarked(filled(model))
    with torch.no_grad():
        for layer, decoder in zip(cache.layers, model.model.layers, strict=True):
            layer.keys.add_(-0.5 * decoder.self_attn.key_shift.half())
    assert abs(measured(model, cache) - 0.5) < 0.1
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="do not look like"):
        rest(model, cache)


def test_a_cache_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wait for the GPU for each cache that came without marks, not one for each layer or token."""
    stock, model, calls, measure = build(TINY, ("keys",)).half(), fixed("keys"), [], cache_origin.measure
    monkeypatch.setattr(cache_origin, "measure", lambda *arguments: calls.append(1) or measure(*arguments))
    cache = filled(stock)
    for token in range(FIRST, FIRST + 4):
        logits(model, PROMPT[:, token : token + 1], **{CACHE: cache})
    assert len(calls) == 1


def test_witnesses_come_and_go_with_the_fix() -> None:
    """They are of the weights that are there: fixing again makes them anew, unfixing leaves nothing."""
    model = fixed("keys")
    attention = model.model.layers[0].self_attn
    assert list(attention.witnesses) == list(range(TINY.layers))
    assert {value.dtype for seen in attention.witnesses.values() for value in seen[1:]} == {torch.float32}
    assert {value.device.type for seen in attention.witnesses.values() for value in seen[1:]} == {"cpu"}
    before = attention.witnesses[0].centre
    with torch.no_grad():
        attention.k_proj.bias.mul_(2)
    qwen2_fp16_fix.fix(model)
    assert torch.equal(attention.witnesses[0].centre, 2 * before)
    qwen2_fp16_fix.unfix(model)
    assert "witnesses" not in vars(attention)


@pytest.mark.parametrize("sort", ["dynamic", "static"])
def test_a_cache_that_compiled_code_has_filled_is_gone_on_with(sort: str) -> None:
    """Compiled code leaves no marks. A dynamic cache used to be taken for a stock model's then: KL 0.6."""
    model, oracle = fixed("keys"), logits(build(TINY, ("keys",)))[:, FIRST:]
    torch._dynamo.reset()
    cache = None if sort == "dynamic" else static(model)
    cache = filled(torch.compile(model, backend="eager", fullgraph=True), cache)
    assert kl_to(oracle, rest(model, cache)) < CLOSE


# --- what the user says ---


def test_adopting_marks_every_layer_as_the_model_would() -> None:
    model = fixed("keys")
    cache = DynamicCache()
    assert qwen2_fp16_fix.adopt_cache(cache, model) is cache
    assert cache.__dict__[caches.MARKS] == filled(model).__dict__[caches.MARKS]
    qwen2_fp16_fix.adopt_cache(cache, model, centred=False)
    assert marks(cache) == {caches.STOCK}


def test_what_cannot_be_marked_is_an_error() -> None:
    model = fixed()
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="DynamicCache"):
        qwen2_fp16_fix.adopt_cache(((torch.ones(1), torch.ones(1)),), model)
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="not fixed"):
        qwen2_fp16_fix.adopt_cache(DynamicCache(), qwen2_fp16_fix.unfix(model))
    with pytest.raises(qwen2_fp16_fix.NotQwen2Error):
        qwen2_fp16_fix.adopt_cache(DynamicCache(), torch.nn.Linear(1, 1))


# --- PEFT's prefix tuning ---


def with_prefix(model: Any) -> Any:
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))


def learn(model: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the prefix."""
    found = model(input_ids=PROMPT, labels=PROMPT)
    (found.loss.float() * 64).backward()
    gradient = model.prompt_encoder.default.embedding.weight.grad
    return found.logits.detach().float(), gradient.float() / 64


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks transformers for it
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # and calls the cache so
@pytest.mark.parametrize("first", ["fixed", "wrapped"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kinds", [(), ("scores",)], ids="+".join)
def test_a_learned_prefix_is_uncentred_and_learns(kinds: tuple[str, ...], attention: str, first: str) -> None:
    """Its keys are made anew in each forward, without a mark, and look like anything."""
    exact = with_prefix(build(TINY, kinds, attn_implementation=attention))
    half = build(TINY, kinds, attn_implementation=attention).half()
    model = with_prefix(qwen2_fp16_fix.fix(half)) if first == "fixed" else qwen2_fp16_fix.fix(with_prefix(half))
    model.load_state_dict(exact.state_dict())
    (oracle, wanted), (found, gradient) = learn(exact), learn(model)
    assert kl_to(oracle, found) < CLOSE
    assert float((wanted - gradient).norm() / wanted.norm()) < 5e-3  # 1e-3, as other gradients in float16, and room
