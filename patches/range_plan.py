"""Upper bounds, from weights alone, of every float16 number in a Qwen2 layer, and exponents that keep them in range.

The bounds hold for every prompt. What they rest on, for the arithmetic of the fixed layer:

1. An RMSNorm returns n_i = γ_i·z_i + η_i with ‖z‖ <= √d, up to rounding, and |η_i| <= 2^-25 where n_i is subnormal.
   With h_i = √(γ_i² + 2^-24), n = h∘y, and ‖y‖ <= ‖z‖ + 2^-13·√d, as |γ_i| <= h_i and |η_i| <= 2^-13·h_i. So
   |n_i| <= h_i·‖y‖, and for a row w, with a = w∘h, the magnitudes |w_i·n_i| sum to at most ‖a‖·‖y‖ (Cauchy and
   Schwarz), and with them any part of the sum, in any order.
2. Matmuls accumulate in fp32, PyTorch's default, and round at most SPLITS partial sums to float16: `after_matmul`
   bounds what the next step reads. Float16 accumulation, a switch that is off by default, is covered by a factor of 2
   in LIMIT. A float16 s is itself a float16 number at distance |t| from s + t. So rounding s + t moves away from s by
   at most 2|t|, and a chain of additions ends at most at twice the sum of magnitudes.
3. A rotation turns a pair without lengthening it. The centre of the keys is no longer than their bias
   (key_centring.py). Attention averages values with weights that sum to 1, up to rounding.
4. |act(g)| <= |g|, and |g·u| = |⟨a,y⟩⟨b,y⟩| <= ‖y‖²/2·(‖a‖‖b‖ + |⟨a,b⟩|): the largest eigenvalue of (abᵀ + baᵀ)/2.
5. An output, and any part of it, is at most Σ_j |w_j|·(bound of input j).

Steps that run element by element (w∘h, and sums along a row) are fp32 on the weight's own device. `fp32_slack` widens
them by more than fp32 can lose in any order of the sums. All other steps are fp64 on the CPU, widened by MARGIN. No
step is a matmul: TF32 and similar modes, which a user may have switched on, would round its operands.

The names of weights and sites are those of `architecture.QWEN2`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .architecture import QWEN2, Architecture

FLOAT16_MAX = 65504.0  # the largest float16; every other module takes it from here
UNIT = 2.0**-11  # relative rounding error of float16
TINY = 2.0**-25  # absolute rounding error of a float16 below 2^-14
REST = 2.0**-13  # TINY over the smallest h of point 1: subnormal rounding of a norm's output, relative to h
SPLITS = 64  # partial sums of a matmul that a split-K kernel may round
LIMIT = FLOAT16_MAX / (2 * (1 + UNIT) ** (SPLITS + 1))  # for a sum of magnitudes
MARGIN = 1 + 2.0**-30
MAX_EXPONENT = 24  # a larger one would round small values to 0: float16's smallest number is 2^-24
FP32_ELEMENTS = {"cpu": 2**18}  # elements of a weight held in fp32 at a time: as many as a core's cache holds
FP32_ELEMENTS_ELSEWHERE = 2**24  # on an accelerator, where a kernel launch costs more than memory

#: Activations with |act(x)| <= |x|, by transformers' names.
CONTRACTIONS = {"silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"}


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer; `positions` is the longest context, `rotation_scale` what yarn multiplies cos and sin by."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    activation: str = "silu"
    rotation_scale: float = 1.0


def layer_shapes(shape: LayerShape, intermediate: int, row: Architecture = QWEN2) -> dict[str, tuple[int, ...]]:
    """`Architecture.shapes` of a layer of these sizes, by names below `layers.N.`. intermediate: the MLP's width."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"hidden": shape.hidden, "queries": queries, "keys": keys, "head": shape.head_dim}
    return row.shapes(sizes | {"intermediate": intermediate})


@dataclass(frozen=True)
class LayerBounds:
    """The largest bound over the channels of each site.

    It bounds a stored number, or a sum of magnitudes and so every partial sum: `Site.limit` says which.
    """

    norm: float
    q: float
    k: float
    v: float
    rotated: float
    attention: float
    o_proj: float
    gate: float
    up: float
    product: float
    down_proj: float


class Exponents(NamedTuple):
    """2^-mlp scales the SwiGLU product before down_proj, 2^-o_proj the heads' outputs before o_proj; 0 is stock."""

    mlp: int
    o_proj: int


#: What each bound is held against: a stored number against float16's largest, a sum of magnitudes against LIMIT.
LIMITS = {site.bound: FLOAT16_MAX if site.limit == "number" else LIMIT for site in QWEN2.sites if site.bound}
SCALED = QWEN2.scaled_bounds()


def bound_layer(weights: Mapping[str, Tensor], shape: LayerShape) -> LayerBounds:
    """Bounds of one layer. weights: by their names below `model.layers.N.`, in any float dtype; cast to float16 here.

    A weight that is not finite in float16 makes the bounds it reaches infinite. Biases of q, k and v are bounded; no
    other may be among the weights.
    """
    sums = {site: sums_with_bias(weights, site) for site in ("q", "k", "v")}
    queries, keys, values = (after_matmul(each, shape.hidden) for each in sums.values())
    centre = rotated_bound(bias_magnitudes(weights, "k"), shape)  # it is no longer than the bias
    rotated = (largest(rotated_bound(queries, shape)), largest(rotated_bound(keys, shape) + centre))
    attention = attention_sums(values, shape)
    products, gate, up = product_bounds(weights, shape)
    return LayerBounds(
        norm=max(bound_norm(weights[f"{norm}.weight"]) for norm in QWEN2.norms()),
        **{site: largest(each) for site, each in sums.items()},
        rotated=max(rotated),
        attention=largest(attention),
        o_proj=largest(output_sums(weight_at(weights, "o_proj"), after_matmul(attention, shape.positions))),
        gate=gate,
        up=up,
        product=largest(products),
        down_proj=largest(output_sums(weight_at(weights, "down_proj"), products)),
    )


def weight_at(weights: Mapping[str, Tensor], site: str) -> Tensor:
    """The weight (rows, columns) of the linear whose output is at that site."""
    return weights[f"{QWEN2.linear(site).name}.weight"]


def gain_before(weights: Mapping[str, Tensor], site: str) -> Tensor:
    """The gain (hidden,) of the norm in front of that linear."""
    return weights[QWEN2.gain(QWEN2.linear(site).reads)]


def bias_magnitudes(weights: Mapping[str, Tensor], site: str) -> Tensor:
    """Magnitudes of the bias (rows,) of that linear, in fp64 on the CPU; zeros where it has none."""
    bias = weights.get(f"{QWEN2.linear(site).name}.bias")
    if bias is None:
        return torch.zeros(len(weight_at(weights, site)), dtype=torch.float64, device="cpu")
    return float16_values(bias).abs().cpu().double()


def sums_with_bias(weights: Mapping[str, Tensor], site: str) -> Tensor:
    """Sums of magnitudes of that linear's outputs (rows,) behind a norm, its bias included, in fp64."""
    return linear_sums(weight_at(weights, site), gain_before(weights, site)) + bias_magnitudes(weights, site)


def bound_norm(gain: Tensor) -> float:
    """The largest magnitude an RMSNorm with `gain` (hidden,) can return: point 1, with all of z in one channel."""
    return largest(norm_gain_bound(gain).cpu().double() * fp32_slack(0) * norm_length(len(gain)))


def bound_logits(norm: Tensor, head: Tensor) -> float:
    """The sum of magnitudes of a logit. norm: gain of the final norm (hidden,); head: (vocabulary, hidden)."""
    return largest(linear_sums(head, norm))


def plan_layer(bounds: LayerBounds) -> Exponents:
    """The smallest exponents that bring the bounds of SCALED under their limits, up to MAX_EXPONENT."""
    needed: dict[str, int] = {}
    for bound, exponent in SCALED.items():
        needed[exponent] = max(needed.get(exponent, 0), exponent_for(getattr(bounds, bound), LIMITS[bound]))
    return Exponents(**needed)


def headroom_bits(bounds: LayerBounds, exponents: Exponents) -> dict[str, float]:
    """log2 of limit over bound for each site, with the exponents applied: negative or NaN where nothing is proven."""
    bits = {}
    for site, bound in asdict(bounds).items():
        bits[site] = bits_below(LIMITS[site], bound) + (getattr(exponents, SCALED[site]) if site in SCALED else 0)
    return bits


def bits_below(limit: float, bound: float) -> float:
    """log2 of limit over bound; fp32's smallest number stands for a bound of 0."""
    return math.log2(limit) - math.log2(max(bound, 2.0**-149))


def unproven_sites(bounds: LayerBounds, exponents: Exponents) -> list[str]:
    """The sites whose bound passes its limit even with the exponents, which scale partial sums as well."""
    return [site for site, bits in headroom_bits(bounds, exponents).items() if not bits >= 0]


def norm_gain_bound(gain: Tensor) -> Tensor:
    """h of point 1 for a norm's gain (hidden,), in fp32."""
    # Both, because a gain in fp32 is not rounded to float16 under autocast.
    magnitudes = torch.maximum(float16_values(gain).abs(), gain.detach().float().abs())
    return torch.hypot(magnitudes, torch.full_like(magnitudes, TINY / REST))


def linear_sums(weight: Tensor, gain: Tensor) -> Tensor:
    """Sums of magnitudes of the outputs (rows,) of a linear behind a norm, in fp64."""
    gain_bounds, hidden = norm_gain_bound(gain).to(weight.device), len(gain)
    lengths = torch.cat([vector_norm(rows.mul_(gain_bounds), dim=1) for rows in float16_rows(weight)])
    return as_upper_bound(lengths, hidden) * norm_length(hidden)


def norm_length(hidden: int) -> float:
    """The largest ‖y‖ of point 1: √d, widened by the fp32 mean square, by rounding to float16, and by REST."""
    return math.sqrt(hidden) * ((1 + hidden * 2.0**-23) * (1 + UNIT) + REST)


def after_matmul(sums: Tensor, terms: int) -> Tensor:
    """Bounds of the outputs of a matmul whose sums of magnitudes, of `terms` products, are `sums`: point 2."""
    return sums * rounding_growth(terms) + 2 * (SPLITS + 1) * TINY


def rounding_growth(terms: int) -> float:
    """The factor by which rounding can grow a matmul's output over a sum of magnitudes of `terms` products."""
    return (1 + terms * 2.0**-23) * (1 + UNIT) ** (SPLITS + 1)


def rotated_bound(inputs: Tensor, shape: LayerShape) -> Tensor:
    """Length of each pair of channels (i, i + head_dim/2) of a head. A rotation keeps it, yarn multiplies it."""
    lengths: Tensor = inputs.view(-1, 2, shape.head_dim // 2).norm(dim=1)
    return lengths * shape.rotation_scale * (1 + 2.0**-20) * (1 + UNIT) + TINY


def attention_sums(values: Tensor, shape: LayerShape) -> Tensor:
    """Sums of magnitudes of the heads' outputs (heads·head_dim,) from bounds of the values (kv_heads·head_dim,)."""
    weight_sum = 1 + UNIT + shape.positions * (TINY + 2.0**-23)
    shared = (values * weight_sum).view(shape.kv_heads, 1, shape.head_dim)
    return shared.expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)


def product_bounds(weights: Mapping[str, Tensor], shape: LayerShape) -> tuple[Tensor, float, float]:
    """act(gate)·up of each channel (intermediate,) by point 4, and the largest sums of magnitudes of gate and up."""
    hidden, length = shape.hidden, norm_length(shape.hidden)
    gate_weight, up_weight = weight_at(weights, "gate"), weight_at(weights, "up")
    gain_bounds = norm_gain_bound(gain_before(weights, "gate")).to(gate_weight.device)
    gate_lengths, up_lengths, inners = [], [], []
    for gate_rows, up_rows in zip(float16_rows(gate_weight), float16_rows(up_weight), strict=True):
        gate_lengths.append(vector_norm(a := gate_rows.mul_(gain_bounds), dim=1))
        up_lengths.append(vector_norm(b := up_rows.mul_(gain_bounds), dim=1))
        inners.append(a.mul_(b).sum(1))
    gate_length = as_upper_bound(torch.cat(gate_lengths), hidden)
    up_length = as_upper_bound(torch.cat(up_lengths), hidden)
    lengths = gate_length * up_length
    inner = torch.cat(inners).cpu().double().abs() + (fp32_slack(hidden) - 1) * lengths
    gate, up = gate_length * length, up_length * length
    gate_top, up_top = after_matmul(gate, hidden), after_matmul(up, hidden)
    joint = length**2 / 2 * (lengths + inner) + (gate_top - gate) * up_top + gate * (up_top - up)
    products = torch.minimum(joint, gate_top * up_top) * (1 + UNIT) ** 2 * (1 + 2.0**-20)
    products = products + TINY * up_top  # act(gate) may be subnormal
    if shape.activation not in CONTRACTIONS:
        products = torch.full_like(products, math.inf)
    return products, largest(gate), largest(up)


def output_sums(weight: Tensor, inputs: Tensor) -> Tensor:
    """Point 5: Σ_j |w_ij|·inputs_j of each row i, widened for inputs that an exponent makes subnormal.

    Inputs scaled by 2^-e are rounded, which adds at most Σ_j |w_ij|·2^-25. That does not shrink with e. With float16
    weights it is at most columns·65504·2^-25, less than `widening` keeps free below LIMIT.
    """
    columns = weight.shape[1]
    widening = 1 + columns * 2.0**-23
    factors = inputs.to(weight.device, torch.float32) * (1 + 2.0**-23)  # so that rounding to fp32 lowers none
    sums = torch.cat([rows.abs_().mul_(factors).sum(1) for rows in float16_rows(weight)])
    return as_upper_bound(sums, columns) * widening


def fp32_slack(terms: int) -> float:
    """The largest ratio of a sum of `terms` non-negative numbers to the same sum in fp32, in any order.

    It allows eight more roundings: those of the terms, and of a square root of the sum.
    """
    return 1 + (terms + 8) * 2.0**-23


def as_upper_bound(sums: Tensor, terms: int) -> Tensor:
    """Upper bounds in fp64, on the CPU, of the exact sums that fp32 has computed from `terms` non-negative numbers."""
    return sums.cpu().double() * fp32_slack(terms)


def float16_rows(weight: Tensor) -> Iterator[Tensor]:
    """The rows of a weight as `float16_values` gives them, some at a time, in memory of their own."""
    elements = FP32_ELEMENTS.get(weight.device.type, FP32_ELEMENTS_ELSEWHERE)
    return (float16_values(rows, copy=True) for rows in torch.split(weight, max(1, elements // weight.shape[1])))


def float16_values(weight: Tensor, copy: bool = False) -> Tensor:
    """The float16 values of a weight, in fp32: infinite where float16 cannot hold them."""
    return weight.detach().half().to(torch.float32, copy=copy)


def largest(bounds: Tensor) -> float:
    """The largest of the bounds, with the margin for fp64's own rounding; infinite if one is not a number."""
    top = float(bounds.max())
    return math.inf if math.isnan(top) else top * MARGIN


def exponent_for(bound: float, limit: float) -> int:
    """The smallest e >= 0, up to MAX_EXPONENT, with bound·2^-e <= limit."""
    if not math.isfinite(bound):
        return MAX_EXPONENT
    return 0 if bound <= limit else min(MAX_EXPONENT, math.ceil(math.log2(bound / limit)))
