"""The bounds of patches/range_bounds.py: never passed, by exact arithmetic, float16 runs or an adversary."""

import math
import random
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qwen2_fp16_fix.patches import numerics, range_bounds, range_plan, range_sums
from qwen2_fp16_fix.patches.architecture import QWEN2
from qwen2_fp16_fix.patches.planning import boundable_weights, layer_shape
from qwen2_fp16_fix.patches.range_bounds import UNSCALED, Exponents, LayerBounds, LayerShape, bound_layer
from qwen2_fp16_fix.patches.range_plan import MAX_EXPONENT, needed_exponents, plan_layer, unproven_sites
from tests.stress import KINDS, TINY, build

HIDDEN, HEADS, KV, DIM, INNER = 16, 4, 2, 4, 24
SHAPE = LayerShape(hidden=HIDDEN, heads=HEADS, kv_heads=KV, head_dim=DIM, positions=64)


def layer_weights(seed: int, scale: float = 1.0, gain: float = 0.5) -> dict[str, Tensor]:
    """A small random layer, in float16."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale / math.sqrt(size[-1])).half()

    weights = {f"{name}.weight": 1 + gain * matrix(HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")}
    for name, rows in (("q", HEADS * DIM), ("k", KV * DIM), ("v", KV * DIM)):
        weights[f"self_attn.{name}_proj.weight"] = matrix(rows, HIDDEN)
        weights[f"self_attn.{name}_proj.bias"] = matrix(rows)
    weights["self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * DIM)
    for name in ("gate", "up"):
        weights[f"mlp.{name}_proj.weight"] = matrix(INNER, HIDDEN)
    weights["mlp.down_proj.weight"] = matrix(HIDDEN, INNER)
    return weights


def sites(
    weights: dict[str, Tensor], residual: Tensor, dtype: torch.dtype, exponents: Exponents = UNSCALED
) -> dict[str, float]:
    """The largest magnitude at each site for residuals (N, hidden) fp32; attention over the N rows, unmasked.

    The arithmetic of a fixed layer with these exponents, written out here. Numbers are as they are stored, so scaled.
    """
    e, w = exponents, {name: weight.to(dtype) for name, weight in weights.items()}
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def linear(x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, w[f"{name}_proj.weight"])

    def norm(name: str, exponent: int) -> Tensor:
        bound = range_bounds.bound_norm(weights[f"{name}.weight"])
        rounded = exact if bound > range_plan.FLOAT16_MAX else dtype
        normed = numerics.rms_norm(residual, w[f"{name}.weight"].float(), 1e-6, rounded)
        return (normed * 2.0**-exponent).to(dtype)

    def heads(x: Tensor) -> Tensor:
        return x.view(1, len(x), -1, DIM).transpose(1, 2)

    first, bias = norm("input_layernorm", e.input_norm), {x: w[f"self_attn.{x}_proj.bias"] for x in "qkv"}
    found = {"input_norm": first} | {x: linear(first, f"self_attn.{x}") for x in "qkv"}
    biased = {x: found[x].to(exact) * 2.0**e.input_norm + bias[x] for x in "qk"}
    found |= {f"biased_{x}": each for x, each in biased.items()}
    factors = {"beta": 2.0**-e.o_proj, "alpha": 2.0 ** (e.input_norm - e.o_proj)}
    found["value"] = torch.addmm(bias["v"], first, w["self_attn.v_proj.weight"].t(), **factors)
    angle = torch.arange(len(residual))[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    turned = [numerics.rotate(heads(x), angle.cos()[None], angle.sin()[None]) for x in biased.values()]
    turned = [(x * 2.0**-e.rotated).to(dtype) for x in turned]
    found["rotated"] = torch.cat([x.flatten() for x in turned])
    out, _ = numerics.grouped_attention(*turned, heads(found["value"]), None, DIM**-0.5 * 4.0**e.rotated)
    found["attention"] = out.transpose(1, 2).reshape(len(residual), -1).to(dtype)
    found["o_proj"] = linear(found["attention"], "self_attn.o")
    found["post_norm"] = norm("post_attention_layernorm", e.post_norm)
    found |= {name: linear(found["post_norm"], f"mlp.{name}") for name in ("gate", "up")}
    gate, up = (found[name].to(exact) * 2.0**e.post_norm for name in ("gate", "up"))
    found["product"] = (nn.functional.silu(gate) * up * 2.0**-e.mlp).to(dtype)
    found["down_proj"] = linear(found["product"], "mlp.down")
    return {site: float(value.abs().max()) for site, value in found.items()}


def unscaled(magnitudes: dict[str, float], exponents: Exponents) -> dict[str, float]:
    """The magnitudes of `sites` in units of the values themselves, as the bounds are."""
    scaled = QWEN2.scaled_bounds()
    return {
        site: x * 2.0 ** getattr(exponents, scaled[site]) if site in scaled else x for site, x in magnitudes.items()
    }


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.integers(-24, 5),
    grown=st.lists(st.tuples(st.sampled_from([*layer_weights(0)]), st.integers(0, 18)), max_size=3),
    lone=st.sampled_from([0.0, 1.0, 300.0, 6e4]),
    peak=st.floats(0, 1e4),
    size=st.floats(1e-3, 1e5),
)
def test_no_forward_passes_a_bound(
    seed: int, scale: int, grown: list[tuple[str, int]], lone: float, peak: float, size: float
) -> None:
    """Float16 as the layer runs it, with its exponents, and fp64, on residuals with one channel far above the others.

    Weights from subnormal to those that ask for every exponent, and beyond what any proves: `grown` names some, and by
    how many bits. `lone` is the gain of a channel that the linears behind the norm ignore.
    """
    weights = layer_weights(seed, 2.0**scale, seed % 5)
    for name, bits in grown:
        weights[name] = (weights[name].float() * 2.0**bits).clamp(-65504, 65504).half()
    if lone:
        weights["post_attention_layernorm.weight"][1] = lone
        for name in ("gate", "up"):
            weights[f"mlp.{name}_proj.weight"][:, 1] = 0
    planned = plan_layer(weights, SHAPE)
    residual = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(seed))
    residual[:, seed % HIDDEN] *= peak
    residual[0] = torch.eye(HIDDEN)[1]
    cases = [(torch.float64, UNSCALED, planned.unscaled)]
    if not unproven_sites(planned.bounds, planned.exponents):  # else what overflows is no bound's business
        cases.append((torch.float16, planned.exponents, planned.bounds))
    for dtype, exponents, bounds in cases:
        magnitudes = sites(weights, residual * size, dtype, exponents)
        assert all(map(math.isfinite, magnitudes.values())), (dtype, magnitudes)
        for site, magnitude in unscaled(magnitudes, exponents).items():
            limit = asdict(bounds)[site] * range_sums.rounding_growth(HIDDEN)  # of what is computed, not the exact sum
            limit += 130 * range_sums.TINY * 2.0 ** max(exponents)  # where that is subnormal
            assert magnitude <= limit, (site, dtype, magnitude, limit)


def test_a_norm_that_overflows_by_itself_is_scaled() -> None:
    """No linear has to look at a channel for its norm to overflow there: 0 · inf is NaN."""
    weights = layer_weights(6)
    weights["post_attention_layernorm.weight"][1] = 6e4
    for name in ("gate", "up"):
        weights[f"mlp.{name}_proj.weight"][:, 1] = 0
    planned = plan_layer(weights, SHAPE)
    assert unproven_sites(planned.unscaled, UNSCALED) == ["post_norm"]
    assert planned.exponents == Exponents(post_norm=2)  # 6e4 · √16 is below 4 · 65504
    found = sites(weights, torch.eye(HIDDEN)[1:2], torch.float16)
    assert math.isinf(found["post_norm"])
    assert math.isnan(found["gate"])
    found = sites(weights, torch.eye(HIDDEN)[1:2], torch.float16, planned.exponents)
    assert 5e4 < found["post_norm"] < 65504
    assert all(map(math.isfinite, found.values()))


def test_an_exponent_leaves_room_for_what_it_makes_subnormal() -> None:
    """Inputs that the exponent sends below 2^-24 can round up to it, which no exponent shrinks."""
    for columns in (16, 4096, 2**21):
        weight = torch.full((1, columns), 65504.0).half()
        inputs = torch.ones(columns, dtype=torch.float64)
        bound, exactly = float(range_sums.output_sums(weight, inputs)), 65504.0 * columns
        spill = 65504.0 * columns * range_sums.TINY
        largest_allowed = exactly * range_plan.LIMIT / (bound / range_sums.fp32_slack(columns))  # once it is scaled
        assert largest_allowed + spill <= range_plan.LIMIT


def test_what_rounds_up_from_below_float16s_smallest_number_is_bounded() -> None:
    """1.51 · 2^-24 rounds to 2 · 2^-24: on numbers this small, rounding adds more than any factor near 1."""
    gain = torch.full((HIDDEN,), 2.0**-24)
    row = torch.zeros(1, HIDDEN)
    row[0, :7] = 1.0
    z = row[0] * 1.51
    assert z.norm() <= math.sqrt(HIDDEN)
    output = (gain * z).half().double() @ row[0].double()
    assert output == 14 * 2.0**-24
    assert output <= float(range_sums.linear_sums(row, gain))
    normal = 2.0**16 * gain  # until an exponent of 16 scales it
    scaled = numerics.scaled_down((normal * z).half(), 16).double() @ row[0].double() * 2.0**16
    assert scaled == 14 * 2.0**-8
    assert float(range_sums.linear_sums(row, normal)) < scaled <= float(range_sums.linear_sums(row, normal, 16))
    stored = torch.tensor([0.6 * 2.0**-24], dtype=torch.float64)
    assert stored.half() > stored
    assert range_sums.after_matmul(stored, 1) >= stored.half().double()
    scaled = numerics.scaled_down(stored * 2.0**10, 10).double() * 2.0**10
    assert range_sums.after_matmul(stored * 2.0**10, 1) < scaled <= range_sums.after_matmul(stored * 2.0**10, 1, 10)


def test_split_sums_that_all_round_up_pass_no_bound() -> None:
    """2048 + 1.008 rounds to 2050: a gate and an up summed in 16 rounded parts, on the input that is worst for both."""
    terms = torch.full((HIDDEN,), 1.008, dtype=torch.float64)
    terms[0] = 2049.0
    hidden = (terms / terms.sum() * HIDDEN).sqrt().half()
    row = (terms / hidden.double()).half()
    weights = layer_weights(9)
    weights["post_attention_layernorm.weight"] = torch.ones(HIDDEN).half()
    for name in ("gate", "up"):
        weights[f"mlp.{name}_proj.weight"] = row.expand(INNER, HIDDEN).clone()
    products = row.double() * hidden.double()
    total = torch.zeros((), dtype=torch.float16)
    for product in products:
        total = (total.double() + product).half()
    assert total > 1.005 * products.sum()
    assert float(total.double() ** 2) <= bound_layer(weights, SHAPE).product


def test_exact_arithmetic_passes_no_bound() -> None:
    """Fractions round nothing: what the inequalities say of real numbers, on inputs of norm exactly √hidden."""
    weights = layer_weights(3)
    bounds = bound_layer(weights, SHAPE)
    rng = random.Random(0)
    gain = [Fraction(float(x)) for x in weights["post_attention_layernorm.weight"]]
    gate, up = ([[Fraction(float(x)) for x in row] for row in weights[f"mlp.{n}_proj.weight"]] for n in ("gate", "up"))
    for _ in range(200):
        signs = [Fraction(rng.choice((-1, 1))) for _ in range(HIDDEN)]  # ‖signs‖² is hidden
        hidden = [g * s for g, s in zip(gain, signs, strict=True)]
        for gate_row, up_row in zip(gate, up, strict=True):
            g = sum(w * x for w, x in zip(gate_row, hidden, strict=True))
            u = sum(w * x for w, x in zip(up_row, hidden, strict=True))
            assert abs(g) <= Fraction(bounds.gate)
            assert abs(u) <= Fraction(bounds.up)
            assert abs(g * u) <= Fraction(bounds.product)


def maximiser(a: Tensor, b: Tensor | None = None) -> Tensor:
    """The z of norm √hidden with the largest ⟨a,z⟩, or the largest |⟨a,z⟩⟨b,z⟩|."""
    direction = a if b is None else a / a.norm() + (1 if a @ b >= 0 else -1) * b / b.norm()
    return direction / direction.norm() * math.sqrt(HIDDEN)


def test_an_adversary_comes_close() -> None:
    """A bound that no input comes near would ask for exponents that nothing needs."""
    weights = {name: weight.double() for name, weight in layer_weights(5).items()}
    bounds = bound_layer(weights, SHAPE)
    gain = weights["post_attention_layernorm.weight"]
    gate, up = (weights[f"mlp.{name}_proj.weight"] * gain for name in ("gate", "up"))
    reached = max(float(row @ maximiser(row)) for row in gate)
    assert 0.95 < reached / bounds.gate <= 1  # 64 roundings of split sums are what lies between
    products = [float((a @ maximiser(a, b)) * (b @ maximiser(a, b))) for a, b in zip(gate, up, strict=True)]
    assert 0.85 < max(map(abs, products)) / bounds.product <= 1  # the same, twice


def test_gradient_ascent_passes_no_bound_and_comes_within_a_factor() -> None:
    """On down_proj, where every channel would have to peak at once. Within 32 here: five bits at the very most."""
    weights = {name: weight.double() for name, weight in layer_weights(7).items()}
    bounds = bound_layer(weights, SHAPE)
    gain = weights["post_attention_layernorm.weight"]
    best = 0.0
    for restart in range(8):
        z = torch.randn(HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(restart)).requires_grad_()
        for _ in range(300):
            hidden = gain * z / z.norm() * math.sqrt(HIDDEN)
            gate, up = weights["mlp.gate_proj.weight"] @ hidden, weights["mlp.up_proj.weight"] @ hidden
            magnitudes = weights["mlp.down_proj.weight"].abs() @ (nn.functional.silu(gate) * up).abs()
            value = magnitudes.max()
            (slope,) = torch.autograd.grad(value, z)
            z = (z + 0.1 * slope / slope.norm()).detach().requires_grad_()
            best = max(best, value.item())
    assert bounds.down_proj / 32 < best <= bounds.down_proj


def chain(terms: Tensor) -> tuple[float, float]:
    """Largest magnitude of a float16 accumulation of `terms` in their order, every sum rounded, and Σ|t|."""
    total, top = torch.zeros((), dtype=torch.float16), 0.0
    for term in terms.half():
        total = (total.double() + term.double()).half()
        top = max(top, abs(float(total)))
    return top, float(terms.half().double().abs().sum())


def test_float16_accumulation_in_any_order_stays_within_twice_the_sum() -> None:
    """The lemma behind LIMIT, on random orders and signs. It holds the proof's arithmetic; no code of the plan runs."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        terms = torch.randn(600, generator=generator) * torch.rand(600, generator=generator) * 20
        top, magnitudes = chain(terms[torch.randperm(600, generator=generator)])
        assert top <= 2 * magnitudes


def test_float16_accumulation_can_outgrow_the_sum() -> None:
    """2048 + 1.0078 rounds to 2050: the factor is no pedantry. The lemma's other half; no code of the plan runs."""
    terms = torch.cat((torch.tensor([2048.0]), torch.full((1000,), 1.0078125)))
    top, magnitudes = chain(terms)
    assert 1.3 < top / magnitudes <= 2


SAFE = LayerBounds(**dict.fromkeys(asdict(bound_layer(layer_weights(0), SHAPE)), 1.0))


@pytest.mark.parametrize(("site", "limit"), range_plan.LIMITS.items())
def test_one_bit_past_the_limit_asks_for_one_exponent(site: str, limit: float) -> None:
    """Each site has one, and proves nothing beyond the largest."""
    at, past = replace(SAFE, **{site: limit}), replace(SAFE, **{site: limit * 2})
    assert unproven_sites(at, UNSCALED) == []
    assert unproven_sites(past, UNSCALED) == [site]
    asked = needed_exponents(past)
    name = QWEN2.scaled_bounds()[site]
    assert asked == Exponents(**{name: 1} | ({"o_proj": 1} if name == "input_norm" else {}))
    assert unproven_sites(past, asked) == []
    farthest, beyond = (replace(SAFE, **{site: limit * 2.0 ** (MAX_EXPONENT + more)}) for more in (0, 1))
    assert unproven_sites(farthest, needed_exponents(farthest)) == []
    assert unproven_sites(beyond, needed_exponents(beyond)) == [site]


def test_the_bounds_are_those_with_the_exponents() -> None:
    """An exponent of 12 that queries ask for rounds what values are computed of to multiples of 2^-12."""
    weights = layer_weights(3)
    weights["self_attn.q_proj.weight"] = (weights["self_attn.q_proj.weight"].float() * 2.0**15).half()
    weights["self_attn.o_proj.weight"] = (weights["self_attn.o_proj.weight"].float() * 2.0**12).half()
    plan = plan_layer(weights, SHAPE)
    assert min(plan.exponents.input_norm, plan.exponents.o_proj) > 0
    assert plan.bounds == bound_layer(weights, SHAPE, plan.exponents)
    assert plan.bounds.v > plan.unscaled.v == bound_layer(weights, SHAPE).v
    assert needed_exponents(plan.bounds) <= plan.exponents


def test_a_bias_is_bounded_where_it_is_stored() -> None:
    """With v, whose matmul adds it; not with q and k, to which it is added in fp32. Stock stores all three with it."""
    weights = layer_weights(3)
    for name in "qkv":
        weights[f"self_attn.{name}_proj.bias"][2] = 6e4
    plan = plan_layer(weights, SHAPE)
    assert plan.exponents == Exponents(o_proj=1, rotated=1)  # keys and their centre are 6e4 long each
    bounds = plan.bounds
    assert max(bounds.q, bounds.k, bounds.v) < 1e3 < 6e4 < min(bounds.biased_q, bounds.biased_k, bounds.value)
    stock = range_plan.stock_headroom_bits(plan.unscaled)
    assert max(stock["q"], stock["k"], stock["v"]) < 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_not_proven(bad: float) -> None:
    for site in range_plan.LIMITS:
        bounds = replace(SAFE, **{site: bad})
        assert site in unproven_sites(bounds, needed_exponents(bounds))


def test_a_planted_weight_flips_the_verdict() -> None:
    """The weights of down_proj, grown until a row stands just below the limit: one bit more, one exponent more."""
    weights = layer_weights(1, scale=4)
    factor = range_plan.LIMIT / bound_layer(weights, SHAPE).down_proj
    assert factor > 2
    weights["mlp.down_proj.weight"] = weights["mlp.down_proj.weight"].double() * factor * 0.99
    assert plan_layer(weights, SHAPE).exponents == UNSCALED
    weights["mlp.down_proj.weight"] = weights["mlp.down_proj.weight"] * 2
    planned = plan_layer(weights, SHAPE)
    assert unproven_sites(planned.bounds, UNSCALED) == ["down_proj"]
    assert planned.exponents == Exponents(mlp=1)


def test_fp32_sums_in_chunks_bound_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every size, one to a chunk: never below the exact sums, and above them by at most `fp32_slack`, twice."""
    monkeypatch.setattr(range_sums, "FP32_ELEMENTS", {"cpu": 1})
    weights = {name: w * 2.0 ** (7 * (i % 3)) for i, (name, w) in enumerate(layer_weights(8).items())}
    weight, gain = weights["mlp.down_proj.weight"], weights["input_layernorm.weight"]
    inputs = torch.rand(INNER, dtype=torch.float64) * 1e3
    sums = range_sums.output_sums(weight, inputs)
    assert torch.all(sums >= weight.double().abs() @ inputs)
    assert torch.all(sums <= (weight.double().abs() @ inputs) * range_sums.fp32_slack(INNER) ** 2)
    rows = weights["mlp.up_proj.weight"]
    length = (rows.double() * gain.double()).norm(dim=1)
    found = range_sums.linear_sums(rows, gain)
    assert torch.all(found >= length * range_sums.norm_length(HIDDEN))
    torch.testing.assert_close(found, length * range_sums.norm_length(HIDDEN), rtol=1e-5, atol=0)  # fp32, 24 roundings


def test_a_weight_that_float16_cannot_hold_proves_nothing() -> None:
    for value in (1e6, math.nan, math.inf):
        weights = {name: weight.float() for name, weight in layer_weights(2).items()}
        weights["mlp.up_proj.weight"][3, 4] = value
        planned = plan_layer(weights, SHAPE)
        assert {"up", "product", "down_proj"} <= set(unproven_sites(planned.bounds, planned.exponents))


def test_an_unknown_activation_proves_nothing() -> None:
    """A bound by |act(x)| <= |x| says nothing of an activation that grows."""
    planned = plan_layer(layer_weights(2), replace(SHAPE, activation="relu2"))
    assert "product" in unproven_sites(planned.bounds, planned.exponents)


def test_logits_are_bounded() -> None:
    norm, head = layer_weights(4)["input_layernorm.weight"], torch.randn(50, HIDDEN).half()
    residual = torch.randn(500, HIDDEN)
    logits = numerics.rms_norm(residual, norm, 1e-6, torch.float16).double() @ head.double().T
    assert float(logits.abs().max()) <= range_bounds.bound_logits(norm, head) < 20 * float(logits.abs().max())


def planned(model: Any) -> list[Exponents]:
    found = []
    for layer in model.model.layers:
        layer.self_attn.head_dim = TINY.head_dim
        weights = boundable_weights(layer)
        assert weights is not None
        plan = plan_layer(weights, layer_shape(layer))
        assert unproven_sites(plan.bounds, plan.exponents) == []
        found.append(plan.exponents)
    return found


def test_every_stress_kind_is_proven() -> None:
    """Alone and all at once; and an ordinary model needs no exponent at all."""
    assert set(planned(build(TINY, ()))) == {UNSCALED}
    for kinds in (*((kind,) for kind in KINDS), KINDS):
        planned(build(TINY, kinds))
    assert max(exponents.mlp for exponents in planned(build(TINY, ("swiglu",)))) > 0


@pytest.mark.parametrize(("hidden", "inner", "heads", "kv_heads"), [(896, 4864, 14, 2), (3584, 18944, 28, 4)])
def test_real_widths_need_an_exponent_of_5_at_most(hidden: int, inner: int, heads: int, kv_heads: int) -> None:
    """Random weights at Qwen2's own initial scale of 0.02, gains of 1."""
    generator = torch.Generator().manual_seed(0)
    dim = hidden // heads

    def matrix(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * 0.02).half()

    weights = {f"{name}.weight": torch.ones(hidden).half() for name in ("input_layernorm", "post_attention_layernorm")}
    for name, rows in (("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim)):
        weights |= {f"self_attn.{name}_proj.weight": matrix(rows, hidden), f"self_attn.{name}_proj.bias": matrix(rows)}
    weights["self_attn.o_proj.weight"] = matrix(hidden, heads * dim)
    weights |= {f"mlp.{name}_proj.weight": matrix(inner, hidden) for name in ("gate", "up")}
    weights["mlp.down_proj.weight"] = matrix(hidden, inner)
    plan = plan_layer(weights, LayerShape(hidden, heads, kv_heads, dim, positions=32768))
    assert plan.exponents.mlp <= 5
    assert plan.exponents._replace(mlp=0) == UNSCALED
    assert plan.bounds == plan.unscaled
    assert unproven_sites(plan.bounds, plan.exponents) == []
