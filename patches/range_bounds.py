"""Upper bounds, from weights alone, of every float16 number in a Qwen2 layer. They hold for every prompt.

All are in units of the values themselves. The arithmetic is that of a fixed layer with `Exponents`: 2^-e scales a
number before it is rounded to float16, and the step that reads it in fp32 undoes that. What the bounds rest on:

1. An RMSNorm returns n_i = γ_i·z_i + η_i with ‖z‖ <= √d, up to rounding, and |η_i| <= 2^-25 where n_i is subnormal.
   Scaled by 2^-e it is rounded again. That is exact, or the result is subnormal: then |η_i| <= 2^-25·(1 + 2^e) <=
   2^(e-24) in units of n. Let t be 2^-25 where e is 0, else 2^(e-24). With h_i = √(γ_i² + (2^13·t)²), n = h∘y, and ‖y‖
   <= ‖z‖ + 2^-13·√d, as |γ_i| <= h_i and |η_i| <= 2^-13·h_i. So |n_i| <= h_i·‖y‖, and for a row w, with a = w∘h, the
   magnitudes |w_i·n_i| sum to at most ‖a‖·‖y‖ (Cauchy and Schwarz), and with them any part of the sum, in any order. A
   norm that could exceed float16's largest number returns fp32 (`RMSNorm.is_wide`), and is rounded once, scaled.
2. Matmuls accumulate in fp32, PyTorch's default, and round at most SPLITS partial sums to float16: `after_matmul`
   bounds what the next step reads. An output that is stored times 2^-e is rounded by at most 2^(e-25) where it is
   subnormal. Float16 accumulation, a switch that is off by default, is covered by a factor of 2 in LIMIT. A float16 s
   is itself a float16 number at distance |t| from s + t. So rounding s + t moves away from s by at most 2|t|, and a
   chain of additions ends at most at twice the sum of magnitudes.
3. The biases of q and k are added in fp32, so their matmuls are bounded without them. A rotation turns a pair without
   lengthening it. The centre of the keys is no longer than their bias, or 0 (key_centring.py). A key or query x that is
   held in two parts is hi = fp16(x), no larger than fp16 makes any number of that bound, and lo = fp16(x - hi), at most
   2^-11 of it or 2^-25. v is stored with its bias. Attention averages values with weights that sum to 1, up to
   rounding.
4. |act(g)| <= |g|, and |g·u| = |⟨a,y⟩⟨b,y⟩| <= ‖y‖²/2·(‖a‖‖b‖ + |⟨a,b⟩|): the largest eigenvalue of (abᵀ + baᵀ)/2.
   Where gate and up are scaled, both are brought back in fp32 before the activation and the product.
5. An output, and any part of it, is at most Σ_j |w_j|·(bound of input j).

The names of weights and sites are those of `architecture.QWEN2`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .architecture import QWEN2, Architecture
from .range_sums import (
    TINY,
    UNIT,
    after_matmul,
    as_upper_bound,
    float16_rows,
    float16_values,
    fp32_slack,
    largest,
    linear_sums,
    norm_gain_bound,
    norm_length,
    output_sums,
)

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


class Exponents(NamedTuple):
    """The powers of two by which a layer scales what float16 could not hold; with 0 everywhere it is stock."""

    mlp: int = 0  # 2^-mlp scales the SwiGLU product, undone after down_proj
    o_proj: int = 0  # the values, and so the heads' outputs, undone after o_proj; at least `input_norm`
    input_norm: int = 0  # the input of q, k and v; undone for q and k as their bias is added, and carried on by v
    post_norm: int = 0  # the input of gate and up, undone before the activation and the product
    rotated: int = 0  # rotated queries and keys, each; undone in the factor of the scores


UNSCALED = Exponents()


@dataclass(frozen=True)
class LayerBounds:
    """The largest bound over the channels of each site.

    It bounds a stored number, or a sum of magnitudes and so every partial sum: `Site.limit` says which.
    """

    input_norm: float
    q: float  # without the bias, as in k and v: a fixed layer adds it later
    k: float
    v: float
    value: float  # v with its bias
    rotated: float
    attention: float
    o_proj: float
    post_norm: float
    gate: float
    up: float
    product: float
    down_proj: float
    biased_q: float  # q with its bias, which stock stores, as biased_k
    biased_k: float


def bound_layer(weights: Mapping[str, Tensor], shape: LayerShape, exponents: Exponents = UNSCALED) -> LayerBounds:
    """Bounds of one layer. weights: by their names below `model.layers.N.`, in any float dtype; cast to float16 here.

    A weight that is not finite in float16 makes the bounds it reaches infinite. Biases of q, k and v are bounded; no
    other may be among the weights. The bounds grow with the exponents, by what these make subnormal.
    """
    return LayerBounds(**bound_attention(weights, shape, exponents), **bound_mlp(weights, shape, exponents))


def bound_attention(weights: Mapping[str, Tensor], shape: LayerShape, exponents: Exponents) -> dict[str, float]:
    """The fields of LayerBounds from the first norm to o_proj."""
    scaled, gain = exponents.input_norm, gain_before(weights, "q")
    sums = {site: linear_sums(weight_at(weights, site), gain, scaled) for site in ("q", "k", "v")}
    biased = {site: each + bias_magnitudes(weights, site) for site, each in sums.items()}
    queries, keys = (after_matmul(biased[site], shape.hidden, scaled) for site in ("q", "k"))
    values = after_matmul(biased["v"], shape.hidden, exponents.o_proj)
    centre = rotated_bound(bias_magnitudes(weights, "k"), shape, 0)  # it is no longer than the bias
    turned = (rotated_bound(queries, shape, exponents.rotated), rotated_bound(keys, shape, exponents.rotated) + centre)
    attention = attention_sums(values, shape)
    heads = after_matmul(attention, shape.positions, exponents.o_proj)
    return {
        "input_norm": bound_norm(gain, scaled),
        **{site: largest(each) for site, each in sums.items()},
        "value": largest(biased["v"]),
        "biased_q": largest(biased["q"]),
        "biased_k": largest(biased["k"]),
        "rotated": max(map(largest, turned)),
        "attention": largest(attention),
        "o_proj": largest(output_sums(weight_at(weights, "o_proj"), heads)),
    }


def bound_mlp(weights: Mapping[str, Tensor], shape: LayerShape, exponents: Exponents) -> dict[str, float]:
    """The fields of LayerBounds from the second norm to down_proj."""
    products, gate, up = product_bounds(weights, shape, exponents.post_norm)
    return {
        "post_norm": bound_norm(gain_before(weights, "gate"), exponents.post_norm),
        "gate": gate,
        "up": up,
        "product": largest(products),
        "down_proj": largest(output_sums(weight_at(weights, "down_proj"), products)),
    }


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


def bound_norm(gain: Tensor, exponent: int = 0) -> float:
    """The largest magnitude an RMSNorm with `gain` (hidden,) can return: point 1, with all of z in one channel."""
    return largest(norm_gain_bound(gain, exponent).cpu().double() * fp32_slack(0) * norm_length(len(gain)))


def bound_logits(norm: Tensor, head: Tensor) -> float:
    """The sum of magnitudes of a logit. norm: gain of the final norm (hidden,); head: (vocabulary, hidden)."""
    return largest(linear_sums(head, norm))


def rotated_bound(inputs: Tensor, shape: LayerShape, exponent: int) -> Tensor:
    """Length of each pair of channels (i, i + head_dim/2) of a head. A rotation keeps it, yarn multiplies it.

    That factor may be negative. exponent: the pair is stored times 2^-exponent.
    """
    lengths: Tensor = inputs.view(-1, 2, shape.head_dim // 2).norm(dim=1)
    return lengths * abs(shape.rotation_scale) * (1 + 2.0**-20) * (1 + UNIT) + TINY * 2.0**exponent


def attention_sums(values: Tensor, shape: LayerShape) -> Tensor:
    """Sums of magnitudes of the heads' outputs (heads·head_dim,) from bounds of the values (kv_heads·head_dim,)."""
    weight_sum = 1 + UNIT + shape.positions * (TINY + 2.0**-23)
    shared = (values * weight_sum).view(shape.kv_heads, 1, shape.head_dim)
    return shared.expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)


def product_bounds(weights: Mapping[str, Tensor], shape: LayerShape, exponent: int = 0) -> tuple[Tensor, float, float]:
    """act(gate)·up of each channel (intermediate,) by point 4, and the largest sums of magnitudes of gate and up.

    exponent: gate and up read the norm's output times 2^-exponent.
    """
    hidden, length = shape.hidden, norm_length(shape.hidden)
    gate_weight, up_weight = weight_at(weights, "gate"), weight_at(weights, "up")
    gain_bounds = norm_gain_bound(gain_before(weights, "gate"), exponent).to(gate_weight.device)
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
    gate_top, up_top = after_matmul(gate, hidden, exponent), after_matmul(up, hidden, exponent)
    joint = length**2 / 2 * (lengths + inner) + (gate_top - gate) * up_top + gate * (up_top - up)
    products = torch.minimum(joint, gate_top * up_top) * (1 + UNIT) ** 2 * (1 + 2.0**-20)
    products = products + TINY * up_top  # act(gate) may be subnormal
    if shape.activation not in CONTRACTIONS:
        products = torch.full_like(products, math.inf)
    return products, largest(gate), largest(up)
