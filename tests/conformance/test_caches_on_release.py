"""Caches without marks: rebuilt from their tensors, filled by a stock model, emptied. Keys of two sorts never meet."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import cache_origin
from tests.conformance.models import (
    CACHE,
    CLOSE,
    MASKED_ATTENTIONS,
    PROMPT,
    RELEASE,
    Version,
    fixed_half,
    kl,
    logits,
    stress,
)

pytestmark = pytest.mark.usefixtures("arithmetic")

FIRST = 16  # tokens of the prompt that go into the cache before it is rebuilt


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own: compiled code leaves no marks, so they are missed less once there is some."""
    monkeypatch.setattr(cache_origin, "TRACED", [])


def filled(model: Any) -> Any:
    """A cache that `model` has filled with the first tokens of the prompt."""
    cache = DynamicCache()
    logits(model, PROMPT[:, :FIRST], **{CACHE: cache})
    return cache


def tensors(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Key and value of each layer."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))


def rebuilt(cache: Any) -> Any:
    """A new cache of copies of the same tensors, as from a file: no mark is left on either."""
    new = DynamicCache()
    for layer, (key, value) in enumerate(tensors(cache)):
        new.update(key.clone(), value.clone(), layer)
    return new


def rest(model: Any, cache: Any) -> Tensor:
    """Logits of the other tokens, in two steps, of which the second finds what the first has left."""
    halves = PROMPT[:, FIRST:20], PROMPT[:, 20:]
    return torch.cat([logits(model, tokens, **{CACHE: cache}) for tokens in halves], 1)


@pytest.mark.parametrize("attention", MASKED_ATTENTIONS)
@pytest.mark.parametrize("kinds", [(), ("keys",)], ids="+".join)
def test_a_rebuilt_cache_is_never_mixed_with_other_keys(kinds: tuple[str, ...], attention: str) -> None:
    """KL 0.14, and no word. From 5.4 transformers itself rebuilds none, and who did has to say whose it is."""
    oracle, model = logits(stress(kinds, attention))[:, FIRST:], fixed_half(kinds, attention)
    cache = rebuilt(filled(model))
    if RELEASE >= Version("5.4"):
        with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="adopt_cache"):
            rest(model, cache)
        cache = qwen2_fp16_fix.adopt_cache(rebuilt(filled(model)), model)
    assert kl(oracle, rest(model, cache)) < CLOSE


@pytest.mark.parametrize("attention", MASKED_ATTENTIONS)
@pytest.mark.parametrize("kinds", [(), ("keys",)], ids="+".join)
def test_a_stock_models_cache_is_gone_on_with(kinds: tuple[str, ...], attention: str) -> None:
    """Its keys show what they are. New ones beside them are not centred either, or they would win or lose it all."""
    stock, model = stress(kinds, attention).half(), fixed_half(kinds, attention)
    exact = DynamicCache()
    for layer, (key, value) in enumerate(tensors(filled(stock))):
        exact.update(key.float(), value.float(), layer)
    oracle = rest(stress(kinds, attention), exact)
    assert kl(oracle, rest(model, rebuilt(filled(stock)))) < kl(oracle, rest(stock, filled(stock)))


def test_an_fp32_cache_is_gone_on_with() -> None:
    """A prompt run before `.half()`, then cast: those keys are stock's."""
    model = qwen2_fp16_fix.fix(stress(("scores",)))
    cache = filled(model)
    halves = DynamicCache()
    for layer, (key, value) in enumerate(tensors(cache)):
        halves.update(key.half(), value.half(), layer)
    assert kl(logits(stress(("scores",)))[:, FIRST:], rest(model.half(), halves)) < CLOSE


if RELEASE < Version("4.48"):  # a tuple of tensors is a cache there, and a new cache object is made of it each time

    @pytest.mark.parametrize("filler", ["stock", "fixed"])
    def test_a_tuple_is_known_by_its_keys(filler: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each step of a generation makes a cache anew: measured each time, it would wait for the GPU each time."""
        model = fixed_half(("keys",))
        filling = model if filler == "fixed" else stress(("keys",)).half()
        expected, measure, calls = rest(model, rebuilt(filled(filling))), cache_origin.measure, []
        monkeypatch.setattr(cache_origin, "measure", lambda *given: calls.append(1) or measure(*given))
        past, rows = tuple((key.clone(), value.clone()) for key, value in tensors(filled(filling))), []
        for tokens in (PROMPT[:, FIRST:20], PROMPT[:, 20:]):
            with torch.no_grad():
                out = model(input_ids=tokens, past_key_values=past, use_cache=True)
            past = out.past_key_values
            assert isinstance(past, tuple)
            rows.append(out.logits.float())
        assert torch.equal(torch.cat(rows, 1), expected)
        assert len(calls) == 1


def test_a_cache_said_to_be_learned_gets_uncentred_keys() -> None:
    """Learned keys look like nothing. A model asked to take them for plain ones does as stock does."""
    stock, model = stress().half(), fixed_half()
    learned = [(torch.randn_like(key), torch.randn_like(value)) for key, value in tensors(filled(stock))]

    def cache() -> Any:
        new = DynamicCache()
        for layer, (key, value) in enumerate(learned):
            new.update(key, value, layer)
        return new

    found = rest(model, qwen2_fp16_fix.adopt_cache(cache(), model, centred=False))
    assert kl(rest(stock, cache()), found) < CLOSE
