"""The mark of a cache: by the table of `joined`, in other processes and releases, and with exponents of the values."""

import copy
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import qwen2_fp16_fix
from benchmarks.workloads import CACHE
from qwen2_fp16_fix.patches import cache_origin, caches, projections
from qwen2_fp16_fix.patches.attention_form import claim_keys
from qwen2_fp16_fix.patches.scaling import Ranges
from tests.helpers import ROOT, kl_to
from tests.patches.models import PROMPT, fixed, logits, tables
from tests.stress import TINY, build

FIRST = 32
CLOSE = 2e-5  # KL to fp32 in nats: float16's own 1e-6, and room


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own."""
    monkeypatch.setattr(cache_origin, "TRACED", [])


# --- which keys may go into it ---

KEYS, ZEROS = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)  # zeros: a static cache that was reset
OURS, SCALED, CHANGED, NO_CENTRE = (7, 0), (7, 3), (9, 3), (0, 3)
REFUSED = "refused"

#: The mark of the old keys, what this attention would mark an empty cache with; then the mark of both, if the cache
#: holds keys, zeros, or nothing; and how the old keys are looked at: not at all, whether they are there, or for zeros.
CLAIMS = (
    (caches.STOCK, caches.STOCK, caches.STOCK, caches.STOCK, caches.STOCK, None),
    (OURS, OURS, OURS, OURS, OURS, None),
    (SCALED, SCALED, SCALED, SCALED, SCALED, None),
    (NO_CENTRE, NO_CENTRE, NO_CENTRE, NO_CENTRE, NO_CENTRE, None),
    # a stock model's are gone on with
    (caches.STOCK, OURS, caches.STOCK, caches.STOCK, OURS, "there"),
    (caches.STOCK, SCALED, caches.STOCK, caches.STOCK, SCALED, "there"),
    (caches.STOCK, NO_CENTRE, caches.STOCK, caches.STOCK, NO_CENTRE, "there"),
    # and those of another exponent with theirs
    (OURS, SCALED, OURS, OURS, SCALED, "there"),
    (SCALED, OURS, SCALED, SCALED, OURS, "there"),
    ((0, 5), NO_CENTRE, (0, 5), (0, 5), NO_CENTRE, "there"),
    # stock takes none but its own
    (OURS, caches.STOCK, REFUSED, caches.STOCK, caches.STOCK, "zeros"),
    (NO_CENTRE, caches.STOCK, REFUSED, caches.STOCK, caches.STOCK, "zeros"),
    # no attention takes those of another centre
    (CHANGED, SCALED, REFUSED, SCALED, SCALED, "zeros"),
    (NO_CENTRE, SCALED, REFUSED, SCALED, SCALED, "zeros"),
    (SCALED, NO_CENTRE, REFUSED, NO_CENTRE, NO_CENTRE, "zeros"),
)


class Looks:
    """Stands for what looks at the old keys; remembers how it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: Tensor | None, look: Callable[..., bool]) -> None:
        self.asked: list[str] = []
        self.held, self.look = held, look
        monkeypatch.setattr(caches, "stored_keys", lambda cache, layer: self.held)
        monkeypatch.setattr(caches, "is_emptied", self.is_emptied)
        monkeypatch.setattr(caches, "look_ours", self.look_ours)

    def is_emptied(self, cache: Any, layer: int, look: bool) -> bool:
        assert layer == 3
        self.asked.append("zeros" if look else "there")
        return self.held is None or (look and not bool(self.held.any()))

    def look_ours(self, cache: Any, witnesses: Any, marks_last: bool, differs: bool) -> bool:
        self.asked.append("numbers, with an exponent" if differs else "numbers")
        return self.look()


def claimed(cache: Any, own: Any, marks_last: bool = True) -> Any:
    attention = SimpleNamespace(layer_idx=3, witnesses={}, head_dim=2, ranges=Ranges(values=own[1]), centre=None)
    try:
        return caches.claim_cache(attention, cache, own, marks_last)
    except qwen2_fp16_fix.ForeignCacheError:
        return REFUSED


@pytest.mark.parametrize("held", [KEYS, ZEROS, None], ids=["keys", "zeros", "no keys"])
@pytest.mark.parametrize(("mark", "own", "beside_keys", "beside_zeros", "alone", "looked"), CLAIMS, ids=str)
def test_every_marked_cache_is_claimed_by_the_table(
    mark: Any,
    own: Any,
    beside_keys: Any,
    beside_zeros: Any,
    alone: Any,
    looked: str | None,
    held: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mark or the error, what the cache is marked with, and what was looked at on the way."""
    looks = Looks(monkeypatch, held, lambda: pytest.fail("measured a cache that says whose keys it holds"))
    cache = SimpleNamespace(**{caches.MARKS: {2: OURS, 3: mark}})
    expected = alone if held is None else beside_keys if held is KEYS else beside_zeros
    assert claimed(cache, own) == expected
    assert vars(cache)[caches.MARKS] == {2: OURS, 3: mark if expected == REFUSED else expected}
    assert looks.asked == ([] if looked is None else [looked])


def refuse() -> bool:
    raise qwen2_fp16_fix.ForeignCacheError


@pytest.mark.parametrize("marks_last", [True, False])
@pytest.mark.parametrize("own", [OURS, SCALED, NO_CENTRE], ids=str)
@pytest.mark.parametrize(
    ("look", "expected"),
    [(lambda: True, None), (lambda: False, caches.STOCK), (refuse, REFUSED)],
    ids=["ours", "stock's", "refused"],
)
def test_keys_without_a_mark_are_asked_once(
    look: Callable[..., bool], expected: Any, own: Any, marks_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their numbers, of all layers at once; stock asks nothing, and nothing is asked where there are no keys."""
    looks = Looks(monkeypatch, KEYS, look)
    cache = SimpleNamespace()
    assert claimed(cache, own, marks_last) == (own if expected is None else expected)
    asked = "numbers, with an exponent" if own[1] else "numbers"
    assert looks.asked[0] == asked
    vars(cache)[caches.MARKS].pop(3, None)  # as another layer
    assert claimed(cache, own, marks_last) == (own if expected is None else expected)
    assert looks.asked.count(asked) == (2 if expected == REFUSED else 1)
    looks.held = None
    assert claimed(SimpleNamespace(), own, marks_last) == own
    looks.held, looks.asked = KEYS, []
    assert claimed(SimpleNamespace(), caches.STOCK, marks_last) == caches.STOCK
    assert looks.asked == []


@pytest.mark.parametrize("mark", [OURS, (7, 5), CHANGED, caches.STOCK], ids=str)
def test_keys_may_carry_their_mark_themselves(mark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 4.47 each step moves the tensors to a new cache."""
    looks = Looks(monkeypatch, KEYS.clone(), lambda: pytest.fail("measured keys that say whose they are"))
    caches.note_keys(looks.held, mark)
    assert claimed(SimpleNamespace(), OURS, marks_last=False) == (REFUSED if mark is CHANGED else mark)


def test_a_mark_outlives_its_process() -> None:
    """A pickled cache is gone on with elsewhere, so equal centres and pairs have one version in every process."""
    code = (
        "import torch; from tests.patches.models import fixed;"
        "print([m.centre.version for m in fixed('keys', 'keys_fast').modules() if hasattr(m, 'centre')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    model = fixed("keys", "keys_fast")
    versions = [layer.self_attn.centre.version for layer in model.model.layers]
    assert found.strip() == str(versions)
    assert len({*versions}) == TINY.layers
    assert 0 not in versions


# --- exponents ---


def exact(kinds: tuple[str, ...] = ("keys",)) -> Tensor:
    return logits(build(TINY, kinds))[:, FIRST:]


def ranged(model: Any, ranges: Ranges, planned: bool = True) -> Any:
    """The model with these exponents, as a plan leaves them; planned: whether o_proj has its own still."""
    for layer in model.model.layers:
        layer.self_attn.keep_ranges(ranges)
        layer.self_attn.set_exponent(ranges.values if planned else None)
    return model


def begun(model: Any) -> Any:
    cache = transformers.DynamicCache()
    logits(model, PROMPT[:, :FIRST], **{CACHE: cache})
    return cache


def gone_on(model: Any, cache: Any) -> Tensor:
    """Two tokens alone and then the rest: what is added stays as what was there."""
    parts = PROMPT[:, FIRST : FIRST + 1], PROMPT[:, FIRST + 1 : FIRST + 2], PROMPT[:, FIRST + 2 :]
    return torch.cat([logits(model, each, **{CACHE: cache}) for each in parts], 1)


RANGES = {
    "all": Ranges(input=2, values=3, rotated=1),
    "values": Ranges(values=5),
    "input": Ranges(input=4, values=4),
    "rotated": Ranges(rotated=2),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "by token"])
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_exponents_change_nothing_but_the_range(ranges: Ranges, planned: bool, attention: str) -> None:
    """Powers of two: as near to fp32, in one forward and over a cache; what is stored is as much smaller."""
    plain = begun(fixed("keys", "keys_fast", attention=attention))
    model = ranged(fixed("keys", "keys_fast", attention=attention), ranges, planned)
    oracle = logits(build(TINY, ("keys", "keys_fast")))
    assert kl_to(oracle, logits(model)) < CLOSE
    cache = begun(model)
    assert kl_to(oracle[:, FIRST:], gone_on(model, cache)) < CLOSE
    first, other = plain.layers[0], cache.layers[0]
    torch.testing.assert_close(other.values[:, :, :FIRST] * 2.0**ranges.values, first.values, rtol=2e-3, atol=2e-3)
    high = slice(0, TINY.head_dim)
    keys = other.keys[:, :, :FIRST, high] * 2.0**ranges.rotated
    torch.testing.assert_close(keys, first.keys[..., high], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("now", [0, 3, 6])
@pytest.mark.parametrize("then", [0, 2, 5])
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "by token"])
def test_a_cache_keeps_the_exponent_of_its_values(planned: bool, then: int, now: int, attention: str) -> None:
    """A plan changes or ends in mid-sequence: new values are stored as the old ones, and scaled back exactly."""
    model = ranged(fixed("keys", attention=attention), Ranges(values=then))
    cache = begun(model)
    found = gone_on(ranged(model, Ranges(values=now), planned), cache)
    assert kl_to(exact(), found) < CLOSE
    assert {mark[1] for layer, mark in vars(cache)[caches.MARKS].items() if isinstance(layer, int)} == {then}


@pytest.mark.parametrize("planned", [True, False], ids=["planned", "by token"])
def test_a_stock_models_values_have_no_exponent(planned: bool) -> None:
    cache = begun(build(TINY, (), attn_implementation="eager").half())
    model = ranged(fixed(), Ranges(values=3), planned)
    assert kl_to(exact(()), gone_on(model, cache)) < CLOSE
    assert {mark for layer, mark in vars(cache)[caches.MARKS].items() if isinstance(layer, int)} == {caches.STOCK}


def without_centre() -> Any:
    """A fixed model that has no centre: where there is no bias of the keys to make one of."""
    model = fixed()
    for layer in model.model.layers:
        layer.self_attn.keep_centre(None)
        layer.self_attn.witnesses.clear()
    return model


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("marked", [True, False])
def test_keys_of_another_exponent_are_refused(marked: bool, centred: bool) -> None:
    """They stand beside each other in the same product: no factor brings both in line."""
    model = fixed() if centred else without_centre()
    cache = begun(model)
    if not marked:
        del vars(cache)[caches.MARKS]
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError):
        gone_on(ranged(model, Ranges(rotated=1)), cache)
    cache = begun(model)
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError):
        gone_on(ranged(model, Ranges()), cache)


@pytest.mark.parametrize("values", [0, 2])
def test_a_stock_models_keys_have_no_exponent(values: int) -> None:
    """Refused with and without a centre, also where nothing but the keys would be scaled."""
    for model in (fixed(), without_centre()):
        ranged(model, Ranges(values=values, rotated=1))
        with pytest.raises(qwen2_fp16_fix.ForeignCacheError):
            gone_on(model, begun(build(TINY, ()).half()))


def test_values_of_one_autocast_are_not_mixed_with_those_of_another() -> None:
    """bfloat16 scales no values and the cache has scaled ones: torch itself refuses to put both into one tensor."""
    model, cache = ranged(fixed("keys", dtype=torch.float32), Ranges(values=4)), transformers.DynamicCache()
    with torch.autocast("cpu", torch.float16):
        logits(model, PROMPT[:, :FIRST], **{CACHE: cache})
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="ScalarType"):
        gone_on(model, cache)


def test_values_are_scaled_by_hand_where_a_hook_watches() -> None:
    """The hook sees what stock's would; the values are the same to a rounding."""
    attention = ranged(fixed(), Ranges(input=1, values=3)).model.layers[0].self_attn
    hidden, seen = torch.randn(1, 5, TINY.hidden).half(), []
    cos, sin = (table.float() for table in tables(0, 1, 2, 3, 4))
    form = claim_keys(attention, hidden, None, marks_last=True)
    with torch.no_grad():
        plain = projections.rotated_projections(attention, hidden, cos, sin, form)
        handle = attention.v_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
        watched = projections.rotated_projections(attention, hidden, cos, sin, form)
        handle.remove()
        expected = attention.v_proj(hidden)
    torch.testing.assert_close(seen[0].float(), expected.float(), rtol=2e-3, atol=2e-3)
    for one, other in zip(plain, watched, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("values", [0, 3])
def test_a_mark_of_an_older_release_is_read(values: int) -> None:
    """0.1.1 wrote true or false under another name, for the same centre and values without an exponent."""
    model = fixed("keys")
    cache = begun(model)
    del vars(cache)[caches.MARKS]
    uncentred = copy.deepcopy(cache)
    cache.qwen2_fp16_centred = dict.fromkeys(range(TINY.layers), True)
    uncentred.qwen2_fp16_centred = dict.fromkeys(range(TINY.layers), False)
    ranged(model, Ranges(values=values))
    assert kl_to(exact(), gone_on(model, cache)) < CLOSE
    gone_on(model, uncentred)
    assert {mark for layer, mark in vars(uncentred)[caches.MARKS].items() if isinstance(layer, int)} == {caches.STOCK}


@pytest.mark.parametrize("now", ["scaled", "without a centre", "fp32"])
def test_a_mark_of_an_older_release_is_refused(now: str) -> None:
    model = fixed()
    cache = begun(model)
    del vars(cache)[caches.MARKS]
    cache.qwen2_fp16_centred = dict.fromkeys(range(TINY.layers), True)
    if now == "scaled":
        ranged(model, Ranges(rotated=1))
    elif now == "fp32":
        model.float()
    else:
        model = without_centre()
    with pytest.raises(qwen2_fp16_fix.ForeignCacheError, match="another state"):
        gone_on(model, cache)
