"""Upper bounds, from weights alone, of every float16 number in a Qwen2 layer, and exponents that keep them in range.

The bounds hold for every prompt. What they rest on, for the arithmetic of the fixed layer:

1. An RMSNorm returns n_i = γ_i·z_i + η_i with ‖z‖ <= √d, up to rounding, and |η_i| <= 2^-25 where n_i is subnormal.
   With h_i = √(γ_i² + 2^-24), n = h∘y, and ‖y‖ <= ‖z‖ + 2^-13·√d, as |γ_i| <= h_i and |η_i| <= 2^-13·h_i. So
   |n_i| <= h_i·‖y‖, and for a row w, with a = w∘h, the magnitudes |w_i·n_i| sum to at most ‖a‖·‖y‖ (Cauchy and
   Schwarz), and with them any part of the sum, in any order.
2. Matmuls accumulate in fp32, PyTorch's default, and round at most SPLITS partial sums to float16: `computed` bounds
   what the next step sees. Float16 accumulation, a switch that is off by default, is covered where it happens by a
   factor of 2: a float16 s is itself a float16 number at distance |t| from s + t, so rounding s + t moves away from s
   by at most 2|t|, and a chain of additions ends at most at twice the sum of magnitudes. Hence LIMIT.
3. A rotation turns a pair without lengthening it, and the centre of the keys is no longer than their bias (keys.py);
   attention averages values with weights that sum to 1, up to rounding.
4. |act(g)| <= |g|, and |g·u| = |⟨a,y⟩⟨b,y⟩| <= ‖y‖²/2·(‖a‖‖b‖ + |⟨a,b⟩|): the largest eigenvalue of (abᵀ + baᵀ)/2.
5. An output, and any part of it, is at most Σ_j |w_j|·(bound of input j).

What is done element by element (w∘h and sums along a row) is fp32 on the weight's own device, widened by `slack`, more
than that can lose in any order of the sums; the rest is fp64 on the CPU, widened by MARGIN. None of it is a matmul,
which TF32 and the like, where a user has switched them on, would round.
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
REST = 2.0**-13  # TINY over the smallest `reach`: what subnormal rounding adds to a norm's output, relative to that
SPLITS = 64  # partial sums of a matmul that a split-K kernel may round
LIMIT = FLOAT16_MAX / (2 * (1 + UNIT) ** (SPLITS + 1))  # for a sum of magnitudes
MARGIN = 1 + 2.0**-30
MAX_EXPONENT = 24  # beyond, small values would sink below float16's smallest number
CHUNK = {"cpu": 2**18}  # elements of a weight held in fp32 at a time: what stays in a core's cache
LARGE_CHUNK = 2**24  # on an accelerator, where a kernel launch costs more than memory

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


def layer_shapes(shape: LayerShape, intermediate: int) -> dict[str, tuple[int, ...]]:
    """The shape of every weight and bias a layer can have, by its name below `layers.N.`."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (query, shape.hidden),
        "self_attn.k_proj": (key, shape.hidden),
        "self_attn.v_proj": (key, shape.hidden),
        "self_attn.o_proj": (shape.hidden, query),
        "mlp.gate_proj": (intermediate, shape.hidden),
        "mlp.up_proj": (intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, intermediate),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    found: dict[str, tuple[int, ...]] = {f"{norm}.weight": (shape.hidden,) for norm in norms}
    for name, size in sizes.items():
        found |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return found


@dataclass(frozen=True)
class LayerBounds:
    """The largest bound over the channels of each site.

    norm, rotated and product bound a stored number; the others the sum of magnitudes, and so every partial sum.
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


STORED = {"norm", "rotated", "product"}  # sites held against FLOAT16_MAX; the others are sums, held against LIMIT


def bound_layer(weights: Mapping[str, Tensor], shape: LayerShape) -> LayerBounds:
    """Bounds of one layer. weights: by their names below `model.layers.N.`, in any float dtype; cast to float16 here.

    A weight that is not finite in float16 makes the bounds it reaches infinite. Biases of q, k and v are bounded; no
    other may be among the weights.
    """
    attention_gain, mlp_gain = weights["input_layernorm.weight"], weights["post_attention_layernorm.weight"]
    sums: dict[str, Tensor] = {}
    rotated: list[Tensor] = []
    for name in ("q", "k", "v"):
        sums[name] = project(weights[f"self_attn.{name}_proj.weight"], attention_gain)
        bias = weights.get(f"self_attn.{name}_proj.bias")
        shift = torch.zeros_like(sums[name]) if bias is None else exact(bias).abs().cpu().double()
        sums[name] = sums[name] + shift
        if name != "v":
            rotated.append(rotated_bound(computed(sums[name], shape.hidden), shape))
        if name == "k":
            rotated[-1] = rotated[-1] + rotated_bound(shift, shape)  # the centre is no longer than the bias
    attention = attention_sums(computed(sums["v"], shape.hidden), shape)
    products, gate, up = product_bounds(weights, mlp_gain, shape)
    return LayerBounds(
        norm=max(bound_norm(attention_gain), bound_norm(mlp_gain)),
        q=largest(sums["q"]),
        k=largest(sums["k"]),
        v=largest(sums["v"]),
        rotated=max(largest(rotated[0]), largest(rotated[1])),
        attention=largest(attention),
        o_proj=largest(output_sums(weights["self_attn.o_proj.weight"], computed(attention, shape.positions))),
        gate=gate,
        up=up,
        product=largest(products),
        down_proj=largest(output_sums(weights["mlp.down_proj.weight"], products)),
    )


def bound_norm(gain: Tensor) -> float:
    """The largest magnitude an RMSNorm with `gain` (hidden,) can return: point 1, with all of z in one channel."""
    return largest(reach(gain).cpu().double() * slack(0) * norm_length(len(gain)))


def bound_logits(norm: Tensor, head: Tensor) -> float:
    """The sum of magnitudes of a logit. norm: gain of the final norm (hidden,); head: (vocabulary, hidden)."""
    return largest(project(head, norm))


def plan_layer(bounds: LayerBounds) -> Exponents:
    """The smallest exponents that bring product and down_proj, and o_proj, under their limits, up to MAX_EXPONENT."""
    mlp = max(exponent_for(bounds.product, FLOAT16_MAX), exponent_for(bounds.down_proj, LIMIT))
    return Exponents(mlp, exponent_for(bounds.o_proj, LIMIT))


def headroom_bits(bounds: LayerBounds, exponents: Exponents) -> dict[str, float]:
    """log2 of limit over bound for each site, with the exponents applied: negative or NaN where nothing is proven."""
    scale = {"product": exponents.mlp, "down_proj": exponents.mlp, "o_proj": exponents.o_proj}
    bits = {}
    for site, bound in asdict(bounds).items():
        bits[site] = bits_below(FLOAT16_MAX if site in STORED else LIMIT, bound) + scale.get(site, 0)
    return bits


def bits_below(limit: float, bound: float) -> float:
    """log2 of limit over bound; fp32's smallest number stands for a bound of 0."""
    return math.log2(limit) - math.log2(max(bound, 2.0**-149))


def unproven_sites(bounds: LayerBounds, exponents: Exponents) -> list[str]:
    """The sites whose bound passes its limit even with the exponents. Scaling down shrinks all else, too."""
    return [site for site, bits in headroom_bits(bounds, exponents).items() if not bits >= 0]


def reach(gain: Tensor) -> Tensor:
    """h of point 1 for a norm's gain (hidden,), in fp32."""
    magnitudes = torch.maximum(exact(gain).abs(), gain.detach().float().abs())  # under autocast an fp32 gain stays so
    return torch.hypot(magnitudes, torch.full_like(magnitudes, TINY / REST))


def row_lengths(a: Tensor) -> Tensor:
    """‖a‖ of each row, as fp32 computes it."""
    lengths: Tensor = torch.linalg.vector_norm(a, dim=1)
    return lengths


def project(weight: Tensor, gain: Tensor) -> Tensor:
    """Sums of magnitudes of the outputs (rows,) of a linear behind a norm, in fp64."""
    reaches, hidden = reach(gain).to(weight.device), len(gain)
    lengths = torch.cat([row_lengths(rows.mul_(reaches)) for rows in chunks(weight)])
    return wide(lengths, hidden) * norm_length(hidden)


def norm_length(hidden: int) -> float:
    """The most that ‖y‖ can be: √d, the fp32 rounding of the mean square, one float16 rounding on the way out, REST."""
    return math.sqrt(hidden) * ((1 + hidden * 2.0**-23) * (1 + UNIT) + REST)


def computed(sums: Tensor, terms: int) -> Tensor:
    """What a matmul with such sums of magnitudes, of `terms` products, can return: point 2."""
    return sums * growth(terms) + 2 * (SPLITS + 1) * TINY


def growth(terms: int) -> float:
    """Computed over exact, relative to the sum of magnitudes of `terms` products."""
    return (1 + terms * 2.0**-23) * (1 + UNIT) ** (SPLITS + 1)


def rotated_bound(inputs: Tensor, shape: LayerShape) -> Tensor:
    """Length of each pair of channels (i, i + head_dim/2) of a head: a turn leaves it, yarn scales it."""
    lengths: Tensor = inputs.view(-1, 2, shape.head_dim // 2).norm(dim=1)
    return lengths * shape.rotation_scale * (1 + 2.0**-20) * (1 + UNIT) + TINY


def attention_sums(values: Tensor, shape: LayerShape) -> Tensor:
    """Sums of magnitudes of the heads' outputs (heads·head_dim,) from bounds of the values (kv_heads·head_dim,)."""
    weight_sum = 1 + UNIT + shape.positions * (TINY + 2.0**-23)
    shared = (values * weight_sum).view(shape.kv_heads, 1, shape.head_dim)
    return shared.expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)


def product_bounds(weights: Mapping[str, Tensor], gain: Tensor, shape: LayerShape) -> tuple[Tensor, float, float]:
    """act(gate)·up of each channel (intermediate,) by point 4, and the largest sums of magnitudes of gate and up."""
    hidden, length = shape.hidden, norm_length(shape.hidden)
    gate_weight, up_weight = weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]
    reaches = reach(gain).to(gate_weight.device)
    gate_lengths, up_lengths, inners = [], [], []
    for gate_rows, up_rows in zip(chunks(gate_weight), chunks(up_weight), strict=True):
        gate_lengths.append(row_lengths(a := gate_rows.mul_(reaches)))
        up_lengths.append(row_lengths(b := up_rows.mul_(reaches)))
        inners.append(a.mul_(b).sum(1))
    gate_length, up_length = wide(torch.cat(gate_lengths), hidden), wide(torch.cat(up_lengths), hidden)
    lengths = gate_length * up_length
    inner = torch.cat(inners).cpu().double().abs() + (slack(hidden) - 1) * lengths
    gate, up = gate_length * length, up_length * length
    gate_top, up_top = computed(gate, hidden), computed(up, hidden)
    joint = length**2 / 2 * (lengths + inner) + (gate_top - gate) * up_top + gate * (up_top - up)
    products = torch.minimum(joint, gate_top * up_top) * (1 + UNIT) ** 2 * (1 + 2.0**-20)
    products = products + TINY * up_top  # act(gate) may be subnormal
    if shape.activation not in CONTRACTIONS:
        products = torch.full_like(products, math.inf)
    return products, largest(gate), largest(up)


def output_sums(weight: Tensor, inputs: Tensor) -> Tensor:
    """Point 5: Σ_j |w_ij|·inputs_j of each row i, with room for what an exponent makes subnormal.

    Scaled by 2^-e, the inputs round to Σ_j |w_ij|·2^-25 more at most, which does not shrink with e. Float16 weights
    make that columns·65504·2^-25 at most, which is less than `room` keeps free below LIMIT.
    """
    columns = weight.shape[1]
    room = 1 + columns * 2.0**-23
    factors = inputs.to(weight.device, torch.float32) * (1 + 2.0**-23)  # not below the fp64 they are rounded from
    sums = torch.cat([rows.abs_().mul_(factors).sum(1) for rows in chunks(weight)])
    return wide(sums, columns) * room


def slack(terms: int) -> float:
    """How much larger a sum of `terms` non-negative numbers can be than fp32, in any order, computes it.

    Eight roundings more are for what its terms, or its root, went through.
    """
    return 1 + (terms + 8) * 2.0**-23


def wide(sums: Tensor, terms: int) -> Tensor:
    """fp32 sums of `terms` non-negative numbers as fp64 upper bounds of the exact ones, on the CPU."""
    return sums.cpu().double() * slack(terms)


def chunks(weight: Tensor) -> Iterator[Tensor]:
    """The rows of a weight as `exact` gives them, some at a time, in memory of their own."""
    elements = CHUNK.get(weight.device.type, LARGE_CHUNK)
    return (exact(rows, copy=True) for rows in torch.split(weight, max(1, elements // weight.shape[1])))


def exact(weight: Tensor, copy: bool = False) -> Tensor:
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
