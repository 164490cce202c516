"""Sums along the rows of float16 weights, never below the exact ones: what the bounds of a layer are made of.

The points are those of `range_bounds.py`. Steps that run element by element (w∘h, and sums along a row) are fp32 on the
weight's own device. `fp32_slack` widens them by more than fp32 can lose in any order of the sums. All other steps are
fp64 on the CPU, widened by MARGIN. No step is a matmul: TF32 and similar modes, which a user may have switched on,
would round its operands.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.linalg import vector_norm

UNIT = 2.0**-11  # relative rounding error of float16
TINY = 2.0**-25  # absolute rounding error of a float16 below 2^-14
REST = 2.0**-13  # TINY over the smallest h of point 1: subnormal rounding of a norm's output, relative to h
SPLITS = 64  # partial sums of a matmul that a split-K kernel may round
MARGIN = 1 + 2.0**-30
FP32_ELEMENTS = {"cpu": 2**18}  # elements of a weight held in fp32 at a time: as many as a core's cache holds
FP32_ELEMENTS_ELSEWHERE = 2**24  # on an accelerator, where a kernel launch costs more than memory


def norm_gain_bound(gain: Tensor, exponent: int = 0) -> Tensor:
    """h of point 1 for a norm's gain (hidden,) whose output is then multiplied by 2^-exponent, in fp32."""
    # Both, because a gain in fp32 is not rounded to float16 under autocast.
    magnitudes = torch.maximum(float16_values(gain).abs(), gain.detach().float().abs())
    lost = TINY * 2.0 ** (exponent + 1) if exponent else TINY  # see point 1
    return torch.hypot(magnitudes, torch.full_like(magnitudes, lost / REST))


def linear_sums(weight: Tensor, gain: Tensor, exponent: int = 0) -> Tensor:
    """Sums of magnitudes of the outputs (rows,) of a linear behind a norm whose output is scaled, in fp64.

    They are in units of the unscaled output, as all bounds are.
    """
    gain_bounds, hidden = norm_gain_bound(gain, exponent).to(weight.device), len(gain)
    lengths = torch.cat([vector_norm(rows.mul_(gain_bounds), dim=1) for rows in float16_rows(weight)])
    return as_upper_bound(lengths, hidden) * norm_length(hidden)


def norm_length(hidden: int) -> float:
    """The largest ‖y‖ of point 1: √d, widened by the fp32 mean square, by rounding to float16, and by REST."""
    return math.sqrt(hidden) * ((1 + hidden * 2.0**-23) * (1 + UNIT) + REST)


def after_matmul(sums: Tensor, terms: int, exponent: int = 0) -> Tensor:
    """Bounds of what the next step reads of a matmul whose sums of magnitudes, of `terms` products, are `sums`: point
    2.

    exponent: the matmul's output is stored times 2^-exponent.
    """
    return sums * rounding_growth(terms) + 2 * (SPLITS + 1) * TINY * 2.0**exponent


def rounding_growth(terms: int) -> float:
    """The factor by which rounding can grow a matmul's output over a sum of magnitudes of `terms` products."""
    return (1 + terms * 2.0**-23) * (1 + UNIT) ** (SPLITS + 1)


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

    It allows eight more rounding errors: those of the terms, and of a square root of the sum.
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
