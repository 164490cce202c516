"""Keys in two parts: as near to fp32 as keys that are never rounded, of which pairs, and at what cost."""

import functools
import importlib
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import qwen2_fp16_fix
from benchmarks.cost import cost_of
from qwen2_fp16_fix.patches import key_centring, modeling_qwen2_fp16, numerics, projections, two_part_keys
from qwen2_fp16_fix.patches.attention_form import key_state
from tests.helpers import kl_to
from tests.patches.models import attentions, fixed, logits
from tests.stress import KINDS, QWEN2_7B, TINY, Shape, build, random_prompt

FLOOR = 2e-6  # KL to fp32 in nats: 6e-7 to 1.4e-6 is what float16 costs without any rounding of keys
LONG = {"max_position_embeddings": 32768}
SMALL = Shape(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128, vocab=128)


@pytest.fixture(params=["a CPU's", "a GPU's"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the kernels: on a GPU the query is rounded as well, and products are float16's."""
    if request.param == "a GPU's":
        monkeypatch.setattr(numerics, "runs_on_cpu", lambda tensor: False)
    return str(request.param)


def unrounded(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, form: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`rotated_projections` with keys in fp32, of D channels."""
    turned = numerics.rotate(projections.queries_and_keys(attention, hidden, hidden, 0), cos, sin, form.shift)
    value = projections.values(attention, hidden, hidden, form)
    return *turned.split_with_sizes((turned.shape[1] - value.shape[1], value.shape[1]), dim=1), value


def never_rounded(model: Any, tokens: Tensor) -> Tensor:
    """The logits of a fixed model whose keys are never rounded."""
    module = importlib.import_module(f"qwen2_fp16_fix.patches.{modeling_qwen2_fp16.RANGE.module}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "rotated_projections", unrounded)
        patch.setattr("qwen2_fp16_fix.patches.attention_form.fitting_split", lambda *_: None)
        return logits(model, tokens)


@functools.cache
def measured(kinds: tuple[str, ...], base: float, length: int, shape: Shape = TINY) -> tuple[Any, ...]:
    """An fp32 model's weights, tokens, its logits, and the KL of a fixed float16 model whose keys are never rounded."""
    settings = {"rope_theta": base, "attn_implementation": "sdpa", **LONG}
    model, tokens = build(shape, kinds, **settings), random_prompt(shape, batch=1, length=length)
    oracle = logits(model, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numerics, "runs_on_cpu", lambda tensor: True)
        return (
            model.state_dict(),
            tokens,
            oracle,
            kl_to(oracle, never_rounded(qwen2_fp16_fix.fix(model.half()), tokens)),
        )


def check(kinds: tuple[str, ...], base: float, length: int, attention: str, shape: Shape = TINY) -> None:
    weights, tokens, oracle, floor = measured(kinds, base, length, shape)
    model = build(shape, kinds, rope_theta=base, attn_implementation=attention, **LONG).half()
    model.load_state_dict(weights)
    qwen2_fp16_fix.fix(model)
    assert any(key_state(each).pairs_in_two_parts for each in attentions(model)) == bool(kinds)
    found = logits(model, tokens)
    assert torch.isfinite(found).all()
    assert kl_to(oracle, found) < max(FLOOR, 1.2 * floor)


# --- as near as keys that are never rounded ---

TABLE = [
    (("keys_fast",), 1e6),
    (("keys",), 1e4),
    (("keys_fast",), 1e4),
    (("scores", "keys_fast"), 1e4),
    (("scores", "keys", "keys_fast"), 1e6),
    ((), 1e4),
]


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("kinds", "base"), TABLE, ids=lambda value: "+".join(value) if value.__class__ is tuple else ""
)
def test_every_cell_is_at_the_floor(kinds: tuple[str, ...], base: float, attention: str) -> None:
    """Centred alone they are at 4e-5 to 5e-3 here, and stock at 1e-2."""
    check(kinds, base, 160, attention)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize(("kinds", "base"), [(("keys_fast",), 1e6), (("keys_fast",), 1e4)], ids=["1e6", "1e4"])
def test_longer_prompts_are_at_the_floor(kinds: tuple[str, ...], base: float) -> None:
    check(kinds, base, 1024, "sdpa")


def with_spiked_queries(dtype: torch.dtype) -> Any:
    """300 in the fastest pair of keys and of queries: a query that is rounded loses as much as a key."""
    model = build(TINY, (), attn_implementation="sdpa", **LONG)
    with torch.no_grad():
        for each in (attentions(model)[0], attentions(model)[-1]):
            for projection, strength in ((each.q_proj, 280.0), (each.k_proj, 340.0)):
                projection.bias.view(-1, TINY.head_dim)[:, 0] = strength
    return model.to(dtype)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_queries_may_be_spiked_as_well(attention: str) -> None:
    """1.2e-6; 1.4e-5 on a GPU if the lower part of the query is missing, and 1.5e-2 with centred keys."""
    tokens = random_prompt(TINY, batch=1, length=160)
    oracle = logits(with_spiked_queries(torch.float32), tokens)
    model = qwen2_fp16_fix.fix(with_spiked_queries(torch.float16))
    model.set_attn_implementation(attention)
    assert kl_to(oracle, logits(model, tokens)) < FLOOR


@pytest.mark.parametrize(("kinds", "base"), [(("keys",), 1e4), (("keys_fast",), 1e6)], ids=["1e4", "1e6"])
def test_the_longest_prompts_of_the_table_are_at_the_floor(kinds: tuple[str, ...], base: float) -> None:
    check(kinds, base, 4096, "sdpa")


def test_a_whole_context_is_at_the_floor() -> None:
    """32,768 tokens, in two layers of two heads: what a suite can afford."""
    check(("keys_fast",), 1e4, 32768, "sdpa", SMALL)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kinds", "base"), [(("keys_fast",), 1e6), (("keys",), 1e4)], ids=["1e6", "1e4"])
def test_spikes_cost_bfloat16_little_more_than_ordinary_weights(
    kinds: tuple[str, ...], base: float, attention: str
) -> None:
    """9e-5 beside 6e-5, where centred keys are at 1e-2 and 8e-2, and stock's at 3e-1."""
    tokens = random_prompt(TINY, batch=1, length=160)

    def error(*kinds: str) -> float:
        exact = build(TINY, kinds, rope_theta=base, **LONG)
        model = fixed(*kinds, attention=attention, dtype=torch.bfloat16, rope_theta=base, **LONG)
        return kl_to(logits(exact, tokens), logits(model, tokens))

    assert error(*kinds) < 2 * error()  # 1.0 to 1.6


def without_two_parts(model: Any) -> Any:
    """Its keys centred, and none in two parts."""
    for each in attentions(model):
        each.keep_centre(each.centre._replace(split=None, version=each.centre.version + 2))
    return model


def test_the_limit_lies_between_two_parts_and_a_centre_alone() -> None:
    """Else no test above would see a difference."""
    for kinds, base in TABLE[:-1]:
        *_, tokens, oracle, floor = measured(kinds, base, 160)
        model = without_two_parts(fixed(*kinds, attention="sdpa", rope_theta=base, **LONG))
        assert kl_to(oracle, logits(model, tokens)) > 10 * max(FLOOR, 1.2 * floor)


# --- which pairs ---


def spiked_pairs(kinds: tuple[str, ...]) -> set[int]:
    half = TINY.head_dim // 2
    of_kind = {"scores": {half - 1}, "keys": {half - 2}, "keys_fast": {int(0.75 * half), int(0.625 * half)}}
    return set().union(*(of_kind.get(kind, set()) for kind in kinds))


def pairs_of(model: Any) -> list[list[set[int]]]:
    """The pairs in two parts of each layer and key head."""
    found = []
    for each in attentions(model):
        split = each.centre.split
        heads = [] if split is None else split.channels[0, -TINY.kv_heads :, 0].tolist()
        for channels in heads:
            assert [c + TINY.head_dim // 2 for c in channels[: len(channels) // 2]] == channels[len(channels) // 2 :]
        found.append([{*channels[: len(channels) // 2]} for channels in heads])
    return found


@pytest.mark.parametrize("base", [1e4, 1e6])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), (), KINDS], ids="+".join)
def test_the_spiked_pairs_are_in_two_parts_and_no_others(kinds: tuple[str, ...], base: float) -> None:
    """But for one more where their number is odd. At 1e6 the slowest pairs need it only where scores are large."""
    found = pairs_of(fixed(*kinds, rope_theta=base, **LONG))
    wanted = spiked_pairs(kinds)
    assert found[1:-1] == [[], []]
    for layer in (found[0], found[-1]):
        assert len(layer) == (TINY.kv_heads if wanted else 0)
        for pairs in layer:
            assert wanted <= pairs
            assert len(pairs) == len(wanted) + len(wanted) % 2


def random_biases(groups: int, heads: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """As in checkpoints, apart from the spikes: standard deviations of 1 (keys) and 0.3 to 1 (queries)."""
    generator = torch.Generator().manual_seed(seed)
    keys, queries = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (groups, heads))
    return keys, queries


def rests(base: float, width: int = 128, positions: int = 32768) -> Tensor:
    frequencies = base ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return key_centring.farthest_rests(frequencies, positions)


@pytest.mark.parametrize("base", [1e4, 1e6])
def test_an_ordinary_layer_of_7b_has_no_pair_in_two_parts(base: float) -> None:
    """100 layers with biases drawn at random."""
    for seed in range(100):
        keys, queries = random_biases(QWEN2_7B.kv_heads, QWEN2_7B.heads, 128, seed)
        assert two_part_keys.choose_pairs(keys, queries, rests(base)) is None


@pytest.mark.parametrize("spike", [167.0, 222.0, 302.0, 340.0])
def test_at_a_base_of_ten_thousand_every_published_spike_is_in_two_parts(spike: float) -> None:
    """Whatever the pair, and without any bias of the queries."""
    keys, queries = random_biases(QWEN2_7B.kv_heads, QWEN2_7B.heads, 128, 0)
    for pair in range(64):
        spiked = keys.clone()
        spiked[1, pair] = spike
        split = two_part_keys.choose_pairs(spiked, queries * 0, rests(1e4))
        assert split is not None
        assert pair in split.channels[0, QWEN2_7B.heads + 1, 0]
        assert split.channels.shape[-1] == 4
        assert split.left == 0


def test_a_spike_that_does_not_turn_is_left_to_the_centre() -> None:
    keys = torch.zeros(1, 4, dtype=torch.float64)
    keys[0, 0] = 1000
    rest = torch.tensor([0.01, 1.0], dtype=torch.float64)
    assert two_part_keys.choose_pairs(keys, keys * 0, rest) is None
    assert two_part_keys.choose_pairs(keys, keys * 0, rest * 2) is not None


def test_the_longest_query_of_the_heads_that_read_a_key_counts() -> None:
    keys, queries = torch.zeros(2, 8, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64)
    keys[1, 2], queries[4, 6] = 3, 30  # 90, and 12 without that head
    split = two_part_keys.choose_pairs(keys, queries, torch.ones(4, dtype=torch.float64))
    assert split is not None
    assert 2 in split.channels[0, 7, 0]
    assert torch.equal(split.channels[0, 3], split.channels[0, 7])  # its query heads pick what it picks
    assert torch.equal(split.channels[0, 0], split.channels[0, 6])
    queries[4, 6], queries[0, 6] = 0, 30  # of a head that reads another key
    assert two_part_keys.choose_pairs(keys, queries, torch.ones(4, dtype=torch.float64)) is None


EVEN = [(6, 3, 3, 0), (6, 1, 2, 0), (2, 1, 1, 0), (64, 20, 16, 4), (64, 15, 16, 0)]


@pytest.mark.parametrize(("width", "spiked", "count", "left"), EVEN)
def test_an_even_number_of_pairs_if_a_head_has_as_many(width: int, spiked: int, count: int, left: int) -> None:
    keys = torch.zeros(2, width, dtype=torch.float64)
    keys[0, :spiked] = torch.arange(1, spiked + 1) * 100.0
    split = two_part_keys.choose_pairs(keys, torch.zeros(2, width), torch.ones(width // 2, dtype=torch.float64))
    assert split is not None
    assert split.left == left
    assert split.extra == 4 * count
    chosen = split.channels[0, 2, 0, :count].tolist()
    assert chosen == sorted(chosen)
    assert {*range(spiked - min(spiked, count), spiked)} <= {*chosen}  # those with the longest biases


def test_yarn_makes_keys_longer() -> None:
    """Its factor is in the rotation, so in queries and keys."""
    attention = attentions(fixed())[0]
    with torch.no_grad():
        attention.k_proj.bias.zero_()[0] = 7
    frequencies = torch.ones(TINY.head_dim // 2, dtype=torch.float64)
    attention.centre_keys(frequencies, 4096, 1.0)
    assert attention.centre.split is None  # 7 · √3 · 4 = 48
    attention.centre_keys(frequencies, 4096, 2.0)
    assert attention.centre.split is not None  # 97


def test_a_model_without_a_bias_of_queries_has_pairs_too() -> None:
    model = build(TINY, ("keys_fast",)).half()
    for each in attentions(model):
        each.q_proj.bias = None
    oracle = logits(model.float())
    qwen2_fp16_fix.fix(model.half())
    assert [bool(each) for each in pairs_of(model)] == [True, False, False, True]
    assert kl_to(oracle, logits(model)) < FLOOR


def test_status_names_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_part_keys, "MOST_PAIRS", 2)
    monkeypatch.setattr("qwen2_fp16_fix.patches.attention_form.MOST_PAIRS", 2)
    model = fixed("keys_fast", "keys", rope_theta=1e4)
    rows = qwen2_fp16_fix.status(model).model.ranges
    assert [(row.keys, row.pairs_in_two_parts, row.pairs_left) for row in rows] == [
        ("centred", 2, 1),
        ("centred", 0, 0),
        ("centred", 0, 0),
        ("centred", 2, 1),
    ]
    assert rows[0].why_left == "a head stores at most 2 pairs in two parts"
    assert rows[1].why_left is None


# --- the two parts ---

NUMBERS = st.floats(-60000, 60000, width=32)


@settings(max_examples=300, deadline=None)
@given(number=NUMBERS)
@example(number=1 + 2.0**-11)  # half way between two float16 numbers
@example(number=1 + 2.0**-8)  # and between two of bfloat16
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_compiler_rounds_as_a_cast_does(dtype: torch.dtype, number: float) -> None:
    """To the bit, ties to even; but for numbers below the dtype's normal range, which are 2^-25 off at most."""
    exact = torch.tensor([number])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = two_part_keys.upper(exact, dtype)
    if abs(number) >= torch.finfo(dtype).tiny:
        assert torch.equal(found, exact.to(dtype).float())
    else:
        assert (found - exact).abs() <= 2.0**-25


@settings(max_examples=300, deadline=None)
@given(numbers=st.lists(NUMBERS, min_size=4, max_size=4))
def test_both_parts_of_a_key_are_the_key(numbers: list[float]) -> None:
    """To 22 bits: the proof counts on |lo| being at most 2^-11 of the key."""
    key = torch.tensor(numbers).view(1, 1, 1, 4)
    stored = two_part_keys.widened_keys(key, torch.tensor([1, 3]).view(1, 1, 1, 2), torch.float16)[0, 0, 0].double()
    assert torch.equal(stored[:4], key[0, 0, 0].half().double())
    exact = key[0, 0, 0, [1, 3]].double()
    assert ((stored[4:6] + stored[6:] - exact).abs() <= exact.abs() * 2.0**-22 + 2.0**-25).all()
    assert (stored[6:].abs() <= exact.abs() * 2.0**-11 + 2.0**-25).all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_compiled_code_has_lower_parts() -> None:
    """torch's own compiler takes `x.half().float()` for x: every lower part is 0 then. Other backends hide it."""
    key, channels = torch.linspace(-300, 300, 512).view(1, 2, 64, 4), torch.arange(4).expand(1, 2, 1, 4)
    torch._dynamo.reset()
    compiled: Any = torch.compile(two_part_keys.widened_keys, fullgraph=True)
    query: Any = torch.compile(two_part_keys.widened_queries, fullgraph=True)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(compiled(key, channels, dtype), two_part_keys.widened_keys(key, channels, dtype))
        assert torch.equal(query(key, channels, dtype), two_part_keys.widened_queries(key, channels, dtype))
        assert compiled(key, channels, dtype)[..., -4:].count_nonzero() > 500


def test_a_dtype_that_drops_nothing_has_one_part() -> None:
    """Values in fp32, as bitsandbytes' linears return them for an fp32 input."""
    key, channels = torch.randn(1, 1, 3, 4), torch.arange(4).view(1, 1, 1, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = two_part_keys.widened_keys(key, channels, torch.float32)
    assert torch.equal(found, torch.cat((key, key, key * 0), -1))


def test_a_rounded_query_loses_nothing_in_split_pairs() -> None:
    """q·k in three products of rounded numbers, to 2^-20 of the lengths; the rounded query alone is 2^-12 off."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 64, 4, generator=generator) * 300 for _ in range(2))
    channels = torch.arange(4).view(1, 1, 1, 4)
    wide = two_part_keys.widened_queries(query, channels, torch.float16).half().double()
    stored = two_part_keys.widened_keys(key, channels, torch.float16).double()
    exact = (query.double() * key.double()).sum(-1)
    scale = query.norm(dim=-1).double() * key.norm(dim=-1).double()
    assert (((wide * stored).sum(-1) - exact).abs() / scale).max() < 2.0**-20
    assert (((wide * stored)[..., :4].sum(-1) - exact).abs() / scale).max() > 2.0**-13
    unrounded = two_part_keys.widened_queries(query, channels, None).double()
    assert (unrounded[..., 4:8] == 0).all()
    assert (((unrounded * stored).sum(-1) - exact).abs() / scale).max() < 2.0**-20


# --- what it costs ---


def test_kernels_of_a_layer_with_pairs_in_two_parts() -> None:
    """Of keys: gather, casts to both parts and back, a difference and a concatenation; about as many of queries."""
    counts = []
    for kinds in ((), ("keys_fast",)):
        model = fixed(*kinds, attention="eager")
        layer, hidden = model.model.layers[0], torch.randn(1, 8, TINY.hidden)
        rotation = model.model.rotary_emb(hidden, torch.arange(8)[None])
        with torch.no_grad():
            counts.append(cost_of(functools.partial(layer, hidden, position_embeddings=rotation)))
    plain, wide = counts
    assert not wide.syncs
    assert 0 < wide.kernels - plain.kernels <= 16


@pytest.mark.parametrize("kinds", [(), ("keys_fast",), ("scores",)], ids="+".join)
def test_memory_of_a_cache(kinds: tuple[str, ...]) -> None:
    """Eight channels in keys and values for two pairs, or for one; nothing in a layer without."""
    model = fixed(*kinds)
    with torch.no_grad():
        cache = model(random_prompt(TINY, batch=1, length=16), use_cache=True).past_key_values
    widths = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers]
    extra = 8 if kinds else 0
    assert widths == [(32 + extra,) * 2, (32, 32), (32, 32), (32 + extra,) * 2]
    assert {tensor.dtype for layer in cache.layers for tensor in (layer.keys, layer.values)} == {torch.float16}
    assert not any(layer.values[..., 32:].any() for layer in cache.layers)
