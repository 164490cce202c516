"""The bounds of one layer: those of a fixed one, and what stock would store."""

import math
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from ..checkpoints.weights import UnboundedWeightError, WeightSource, check_shape
from ..patches.architecture import QWEN2
from ..patches.range_bounds import LayerShape, layer_shapes
from ..patches.range_plan import (
    FLOAT16_MAX,
    LIMIT,
    bits_below,
    headroom_bits,
    plan_layer,
    stock_headroom_bits,
    unproven_sites,
)
from .casting import Cast
from .result import LayerCertificate
from .text import unproven_reason

GAINS = tuple(f"{norm}.weight" for norm in QWEN2.norms())


def certify_layer(number: int, source: WeightSource, cast: Cast, residual: float) -> tuple[LayerCertificate, float]:
    """The bounds of one layer and the bound of the residual after it. residual: its bound before the layer."""
    wanted = layer_shapes(source.shape, source.intermediate)
    try:
        weights = {}
        for name in source.layer_names(number):
            full = f"{source.prefix}layers.{number}.{name}"
            stored = check_shape(full, source.read(full), wanted[name])
            half = cast(full, stored)
            weights[name] = stored if name in GAINS else half  # a gain in fp32 is not rounded under autocast
        planned = plan_layer(weights, source.shape)
    except UnboundedWeightError as reason:
        return LayerCertificate(number, {}, {}, {}, False, {}, False, [str(reason)]), math.inf
    exponents, bounds = planned.exponents, planned.bounds
    unproven = unproven_sites(bounds, exponents)
    residual += bounds.o_proj + bounds.down_proj
    stock = stock_headroom_bits(planned.unscaled)
    stock["scores"] = bits_below(LIMIT, bound_scores(weights, source.shape))
    stock["residual"] = bits_below(FLOAT16_MAX, residual)
    found = LayerCertificate(
        layer=number,
        exponents=exponents._asdict(),
        bounds=_finite(asdict(bounds)),
        headroom_bits=_finite(headroom_bits(bounds, exponents)),
        proven=not unproven,
        stock_headroom_bits=_finite(stock),
        stock_proven=all(bits >= 0 for bits in stock.values()),
        reasons=[unproven_reason(site, planned) for site in unproven],
    )
    return found, residual


def bound_scores(weights: Mapping[str, Tensor], shape: LayerShape) -> float:
    """The largest raw score |q·k| of a layer, before it is scaled: ‖q‖·‖k‖ over the heads, in exact arithmetic.

    ‖q‖ <= √d·σ(W∘γ) + ‖b‖ for the rows W of a head. The largest singular value σ comes from the Gram matrix, in fp64 on
    the CPU, since some devices have no fp64.
    """
    gain = weights["input_layernorm.weight"].cpu().double()
    lengths = {}
    for name, heads in (("q", shape.heads), ("k", shape.kv_heads)):
        rows = weights[f"self_attn.{name}_proj.weight"].cpu().double().view(heads, shape.head_dim, shape.hidden) * gain
        bias = weights.get(f"self_attn.{name}_proj.bias")
        shift = 0.0 if bias is None else bias.cpu().double().view(heads, shape.head_dim).norm(dim=1)
        if not rows.isfinite().all():
            return math.inf
        singular = torch.linalg.eigvalsh(rows @ rows.transpose(1, 2))[:, -1].clamp(min=0).sqrt()
        lengths[name] = (singular * math.sqrt(shape.hidden) + shift) * abs(shape.rotation_scale)
    grouped = lengths["q"].view(shape.kv_heads, -1) * lengths["k"].view(-1, 1)
    return float(grouped.max())


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The values, with None for those that are not finite: JSON has no infinity."""
    return {site: value if math.isfinite(value) else None for site, value in values.items()}
