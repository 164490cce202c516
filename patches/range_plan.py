"""Upper bounds, from weights alone, of every float16 number in a Qwen2 layer, and exponents that keep them in range.

The bounds hold for every prompt. What they rest on, for the arithmetic of the fixed layer:

1. An RMSNorm returns n_i = γ_i·z_i + η_i with ‖z‖ <= √d, up to rounding, and |η_i| <= 2^-25 where n_i is subnormal. So
   for a row w, with a = w∘γ, the magnitudes |w_i·n_i| sum to at most √d·‖a‖ + 2^-25·‖w‖₁ (Cauchy and Schwarz), and with
   them any part of the sum, in any order.
2. Matmuls accumulate in fp32, PyTorch's default, and round at most SPLITS partial sums to float16: `rounding(K)`,
   relative to the sum of magnitudes. That is what the next step sees. Float16 accumulation, a switch that is off by
   default, is covered where it happens by a factor of 2: a float16 s is itself a float16 number at distance |t| from
   s + t, so rounding s + t moves away from s by at most 2|t|, and a chain of additions ends at most at twice the sum of
   magnitudes. Hence LIMIT.
3. A rotation turns a pair without lengthening it; attention averages values with weights that sum to 1, up to rounding.
4. |act(g)| <= |g|, and |g·u| = |⟨a,z⟩⟨b,z⟩| <= ‖z‖²/2·(‖a‖‖b‖ + |⟨a,b⟩|): the largest eigenvalue of (abᵀ + baᵀ)/2.
5. An output, and any part of it, is at most Σ_j |w_j|·(bound of input j).

Computed in fp64; MARGIN covers its own rounding.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT16_MAX = 65504.0
UNIT = 2.0**-11  # relative rounding error of float16
TINY = 2.0**-25  # absolute rounding error of a float16 below 2^-14
SPLITS = 64  # partial sums of a matmul that a split-K kernel may round
LIMIT = FLOAT16_MAX / (2 * (1 + UNIT) ** (SPLITS + 1))  # for a sum of magnitudes
MARGIN = 1 + 2.0**-30
MAX_EXPONENT = 24  # beyond, small values would sink below float16's smallest number
ROWS = 2048  # of a weight held in fp64 at a time

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


@dataclass(frozen=True)
class LayerBounds:
    """The largest bound over the channels of each site.

    q, k, v, o_proj, gate, up and down_proj bound the sum of magnitudes, and so every partial sum; rotated, attention
    and product bound a stored number.
    """

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


STORED = {"rotated", "attention", "product"}  # sites held against FLOAT16_MAX; the others are sums, held against LIMIT


def bound_layer(weights: Mapping[str, Tensor], shape: LayerShape) -> LayerBounds:
    """Bounds of one layer. weights: by their names below `model.layers.N.`, in any float dtype; cast to float16 here.

    A weight that is not finite in float16 makes the bounds it reaches infinite.
    """
    attention_gain, mlp_gain = weights["input_layernorm.weight"], weights["post_attention_layernorm.weight"]
    sums: dict[str, Tensor] = {}
    computed: dict[str, Tensor] = {}
    for name in ("q", "k", "v"):
        weight, bias = weights[f"self_attn.{name}_proj.weight"], weights.get(f"self_attn.{name}_proj.bias")
        shift = exact(bias).abs() if bias is not None else torch.zeros(len(weight), dtype=torch.float64)
        magnitudes = torch.cat([norm_fed(rows, attention_gain).magnitudes for rows in chunks(weight)])
        sums[name] = magnitudes + shift
        computed[name] = (magnitudes * rounding(shape.hidden) + shift) * (1 + UNIT)
    heads_out = attention_bound(computed["v"], shape)
    products, gate, up = product_bounds(weights, mlp_gain, shape)
    return LayerBounds(
        q=largest(sums["q"]),
        k=largest(sums["k"]),
        v=largest(sums["v"]),
        rotated=max(largest(rotated_bound(computed[name], shape)) for name in ("q", "k")),
        attention=largest(heads_out),
        o_proj=largest(row_sums(weights["self_attn.o_proj.weight"], heads_out)),
        gate=gate,
        up=up,
        product=largest(products),
        down_proj=largest(row_sums(weights["mlp.down_proj.weight"], products)),
    )


def bound_logits(norm: Tensor, head: Tensor) -> float:
    """The sum of magnitudes of a logit. norm: gain of the final norm (hidden,); head: (vocabulary, hidden)."""
    return max(largest(norm_fed(rows, norm).magnitudes) for rows in chunks(head))


def plan_layer(bounds: LayerBounds) -> Exponents:
    """The smallest exponents that bring product and down_proj, and o_proj, under their limits, up to MAX_EXPONENT."""
    mlp = max(exponent_for(bounds.product, FLOAT16_MAX), exponent_for(bounds.down_proj, LIMIT))
    return Exponents(mlp, exponent_for(bounds.o_proj, LIMIT))


def headroom_bits(bounds: LayerBounds, exponents: Exponents) -> dict[str, float]:
    """log2 of limit over bound for each site, with the exponents applied: negative or NaN where nothing is proven."""
    scale = {"product": exponents.mlp, "down_proj": exponents.mlp, "o_proj": exponents.o_proj}
    bits = {}
    for site, bound in asdict(bounds).items():
        limit = FLOAT16_MAX if site in STORED else LIMIT
        bits[site] = math.inf if bound == 0 else math.log2(limit) - math.log2(bound) + scale.get(site, 0)
    return bits


def unproven_sites(bounds: LayerBounds, exponents: Exponents) -> list[str]:
    """The sites whose bound passes its limit even with the exponents. Scaling down shrinks all else, too."""
    return [site for site, bits in headroom_bits(bounds, exponents).items() if not bits >= 0]


class NormFed(NamedTuple):
    """Rows of a linear behind a norm: a = w∘γ, and the largest sum of magnitudes of each row."""

    a: Tensor
    spill: Tensor  # what subnormal rounding of the norm's output may add
    magnitudes: Tensor


def norm_fed(rows: Tensor, gain: Tensor) -> NormFed:
    """Point 1, for rows (R, hidden) in fp64 and gain (hidden,)."""
    a = rows * exact(gain)
    spill = TINY * rows.abs().sum(1)
    return NormFed(a, spill, norm_length(rows.shape[1]) * a.norm(dim=1) + spill)


def norm_length(hidden: int) -> float:
    """The most that ‖z‖ can be: √d, the fp32 rounding of the mean square, and one float16 rounding on the way out."""
    return math.sqrt(hidden) * (1 + hidden * 2.0**-23) * (1 + UNIT)


def rounding(terms: int) -> float:
    """Computed over exact, relative to the sum of magnitudes of `terms` products: point 2."""
    return (1 + terms * 2.0**-23) * (1 + UNIT) ** (SPLITS + 1)


def rotated_bound(computed: Tensor, shape: LayerShape) -> Tensor:
    """Length of each pair of channels (i, i + head_dim/2) of a head: a turn leaves it, yarn scales it."""
    lengths: Tensor = computed.view(-1, 2, shape.head_dim // 2).norm(dim=1)
    return lengths * shape.rotation_scale * (1 + 2.0**-20) * (1 + UNIT)


def attention_bound(values: Tensor, shape: LayerShape) -> Tensor:
    """Heads' outputs (heads·head_dim,) from bounds of the values (kv_heads·head_dim,): an average, up to rounding."""
    weight_sum = 1 + UNIT + shape.positions * TINY
    averaged = values * weight_sum * rounding(shape.positions)
    shared = averaged.view(shape.kv_heads, 1, shape.head_dim)
    return shared.expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)


def product_bounds(weights: Mapping[str, Tensor], gain: Tensor, shape: LayerShape) -> tuple[Tensor, float, float]:
    """act(gate)·up of each channel (intermediate,) by point 4, and the largest sums of magnitudes of gate and up."""
    products, gates, ups = [], [], []
    square, grow = norm_length(shape.hidden) ** 2, rounding(shape.hidden) * (1 + UNIT)
    pairs = zip(chunks(weights["mlp.gate_proj.weight"]), chunks(weights["mlp.up_proj.weight"]), strict=True)
    for gate_rows, up_rows in pairs:
        gate, up = norm_fed(gate_rows, gain), norm_fed(up_rows, gain)
        inner = (gate.a * up.a).sum(1).abs()
        joint = square / 2 * (gate.a.norm(dim=1) * up.a.norm(dim=1) + inner)
        gate_error = gate.spill + (grow - 1) * gate.magnitudes  # what rounding adds to the exact gate, and to up
        up_error = up.spill + (grow - 1) * up.magnitudes
        joint = joint + gate_error * up.magnitudes * grow + gate.magnitudes * up_error
        apart = gate.magnitudes * up.magnitudes * grow**2
        products.append(torch.minimum(joint, apart) * (1 + UNIT) ** 2)
        gates.append(largest(gate.magnitudes))
        ups.append(largest(up.magnitudes))
    found = torch.cat(products)
    return (found if shape.activation in CONTRACTIONS else torch.full_like(found, math.inf)), max(gates), max(ups)


def row_sums(weight: Tensor, inputs: Tensor) -> Tensor:
    """Σ_j |w_ij|·inputs_j for each row i: point 5."""
    return torch.cat([rows.abs() @ inputs for rows in chunks(weight)])


def chunks(weight: Tensor) -> Iterator[Tensor]:
    """The rows of a weight, ROWS at a time, as `exact` gives them."""
    return (exact(rows) for rows in torch.split(weight, ROWS))


def exact(weight: Tensor) -> Tensor:
    """The float16 values of a weight, in fp64 on the CPU; infinite where float16 cannot hold them or they are NaN."""
    return torch.nan_to_num(weight.detach().cpu().half().double(), nan=math.inf, posinf=math.inf, neginf=-math.inf)


def largest(bounds: Tensor) -> float:
    """The largest of the bounds, with the margin for fp64's own rounding; infinite if one is not a number."""
    top = float(bounds.max())
    return math.inf if math.isnan(top) else top * MARGIN


def exponent_for(bound: float, limit: float) -> int:
    """The smallest e >= 0, up to MAX_EXPONENT, with bound·2^-e <= limit."""
    if not math.isfinite(bound):
        return MAX_EXPONENT
    return 0 if bound <= limit else min(MAX_EXPONENT, math.ceil(math.log2(bound / limit)))
