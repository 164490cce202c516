"""Which exponents keep a layer in range, and whether they do: its bounds against float16's limits.

A bound is that of the unscaled number (range_bounds.py), so an exponent lowers it by as many bits.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

from torch import Tensor

from .architecture import QWEN2
from .range_bounds import UNSCALED, Exponents, LayerBounds, LayerShape, bound_layer
from .range_sums import SPLITS, UNIT

FLOAT16_MAX = 65504.0  # the largest float16; every other module takes it from here
LIMIT = FLOAT16_MAX / (2 * (1 + UNIT) ** (SPLITS + 1))  # for a sum of magnitudes
#: With a larger one even 1 would be rounded to 0: float16's smallest number is 2^-24.
MAX_EXPONENT = 24

#: What each bound is held against: a stored number against float16's largest, a sum of magnitudes against LIMIT.
LIMITS = {site.bound: FLOAT16_MAX if site.limit == "number" else LIMIT for site in QWEN2.sites if site.bound}
SCALED = QWEN2.scaled_bounds()


class PlannedLayer(NamedTuple):
    """The exponents of a layer; its bounds with them; and its bounds without any, which are stock's."""

    exponents: Exponents
    bounds: LayerBounds
    unscaled: LayerBounds


def plan_layer(weights: Mapping[str, Tensor], shape: LayerShape) -> PlannedLayer:
    """The smallest exponents that bring a layer's bounds under their limits, up to MAX_EXPONENT each.

    An exponent makes numbers subnormal, which lets the bounds behind it grow. So the bounds are computed again until
    they need no larger exponents. The exponents only ever rise. A layer that needs none, or one for its product alone,
    is bounded once.
    """
    unscaled = bounds = bound_layer(weights, shape)
    exponents = needed_exponents(bounds)
    bounded = UNSCALED
    while exponents._replace(mlp=0) != bounded:
        bounded = exponents._replace(mlp=0)  # `output_sums` makes room for what that one makes subnormal
        bounds = bound_layer(weights, shape, exponents)
        exponents = Exponents(*map(max, exponents, needed_exponents(bounds)))
    return PlannedLayer(exponents, bounds, unscaled)


def needed_exponents(bounds: LayerBounds) -> Exponents:
    """The smallest exponents that bring these bounds under their limits, up to MAX_EXPONENT each."""
    needed = dict.fromkeys(Exponents._fields, 0)
    for bound, exponent in SCALED.items():
        needed[exponent] = max(needed[exponent], exponent_for(getattr(bounds, bound), LIMITS[bound]))
    # v is computed from the scaled input, and scaled further: its factor must not be above 1.
    return Exponents(**needed | {"o_proj": max(needed["o_proj"], needed["input_norm"])})


def exponent_for(bound: float, limit: float) -> int:
    """The smallest e >= 0, up to MAX_EXPONENT, with bound·2^-e <= limit."""
    if not math.isfinite(bound):
        return MAX_EXPONENT
    return 0 if bound <= limit else min(MAX_EXPONENT, math.ceil(math.log2(bound / limit)))


def headroom_bits(bounds: LayerBounds, exponents: Exponents) -> dict[str, float]:
    """log2 of limit over bound for each site, with the exponents applied: negative or NaN where nothing is proven."""
    found = asdict(bounds)
    return {
        bound: bits_below(limit, found[bound]) + getattr(exponents, SCALED[bound]) for bound, limit in LIMITS.items()
    }


def stock_headroom_bits(bounds: LayerBounds) -> dict[str, float]:
    """The same of a stock layer, which stores the outputs of q, k and v with their biases, and nothing else of v."""
    found = asdict(bounds)
    seen = {site.bound: site.seen_bound for site in QWEN2.sites if site.bound and site.seen_bound}
    del seen["value"]  # it is what stock's v is
    return {bound: bits_below(LIMITS[bound], found[stored]) for bound, stored in seen.items()}


def bits_below(limit: float, bound: float) -> float:
    """log2 of limit over bound; fp32's smallest number stands for a bound of 0."""
    return math.log2(limit) - math.log2(max(bound, 2.0**-149))


def unproven_sites(bounds: LayerBounds, exponents: Exponents) -> list[str]:
    """The sites whose bound exceeds its limit even with the exponents, which scale partial sums as well."""
    return [site for site, bits in headroom_bits(bounds, exponents).items() if not bits >= 0]
