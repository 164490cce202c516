"""The bounds outside the layers: of the embedding, the final norm and the output layers."""

import math

import torch
from torch import Tensor

from ..checkpoints.weights import UnboundedWeightError, WeightSource, check_shape
from ..patches.range_bounds import bound_logits, bound_norm
from ..patches.range_plan import FLOAT16_MAX, LIMIT
from ..translations import number_text
from .casting import Cast


def certify_ends(source: WeightSource, cast: Cast) -> tuple[float | None, float, list[str]]:
    """The largest bound of the logits (None without a head), the embedding's largest number, and the obstacles."""
    gain, unproven = read_final_norm(source, cast)
    reasons = [*source.warnings, *unproven]
    hidden, embedding = source.shape.hidden, f"{source.prefix}embed_tokens.weight"
    heads = source.heads()
    logits, largest = None, 0.0
    for name in dict.fromkeys((embedding, *heads)):
        try:
            found = 0.0
            for stored in source.rows(name):
                rows = check_shape(name, cast(name, stored), (len(stored), hidden))
                if name == embedding:
                    largest = max(largest, float(rows.abs().max()))
                if name in heads:
                    found = max(found, bound_logits(gain, rows))
            bias = name.removesuffix("weight") + "bias"
            if name in heads and source.has(bias):
                found += float(cast(bias, source.read(bias)).abs().max())
        except UnboundedWeightError as reason:
            reasons.append(str(reason))
            largest = math.inf if name == embedding else largest
            continue
        if name in heads:
            logits = max(found, logits or 0.0)
    if logits is not None and not logits <= LIMIT:
        reasons.append(f"logits: bound {number_text(logits)}")
    return logits, largest, reasons


def read_final_norm(source: WeightSource, cast: Cast) -> tuple[Tensor, list[str]]:
    """The gain (hidden,) of the final norm, infinite if it cannot be read, and the obstacles to a proof."""
    hidden, name = source.shape.hidden, f"{source.prefix}norm.weight"
    try:
        gain = check_shape(name, source.read(name), (hidden,))  # in fp32 it is not rounded under autocast
        cast(name, gain)
    except UnboundedWeightError as reason:
        return torch.full((hidden,), math.inf, dtype=torch.float32, device="cpu"), [str(reason)]
    bound = bound_norm(gain)
    return gain, [] if bound <= FLOAT16_MAX else [f"the final norm is bounded by {number_text(bound)} only"]
