"""What the bounds of weights assume of a config, and what a certificate assumes of how a model is run."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoints.rotary import check_rotary, unusual_settings
from ..errors import CheckpointError

EPSILON = 1e-6  # of a config that names none
#: A norm divides by the root of a mean square plus epsilon, in fp32. Squares below 2^-126 may count as 0 there, which
#: is 2^-26 of the least epsilon: the bounds have room for that. Above the largest, torch may refuse to make the number.
EPSILONS = (2.0**-100, 1e30)
FP32_MAX = 2.0**128
BY_TOKEN = (
    "every layer has its weights whole and keeps its exponents: layers that are offloaded, sharded, quantised, adapted "
    "or in training scale by token, which is not proven"
)


@dataclass(frozen=True)
class Assumptions:
    """What a proof rests on beside the weights."""

    positions: int  # tokens, those of the cache included
    dropout: float  # of the attention weights, in training

    def sentences(self) -> list[str]:
        """Each in a sentence."""
        found = [f"no prompt is longer than {self.positions:,} tokens, its answer included", BY_TOKEN]
        return found + ([f"it is not in training: {dropout_text(self.dropout)}"] if self.dropout else [])


def dropout_text(dropout: float) -> str:
    """What dropout does to the values of attention."""
    factor = f"{1 / (1 - dropout):.3g} times as large" if dropout < 1 else "0"
    return f"its attention_dropout of {dropout:g} makes the attention weights that it keeps {factor}"


def dropout_of(config: Mapping[str, Any]) -> float:
    """The share of attention weights that a config drops in training; 0 for a value that is no share."""
    found = config.get("attention_dropout")
    return float(found) if isinstance(found, int | float) and 0 < found <= 1 else 0.0


def unbounded_settings(config: Mapping[str, Any], epsilons: Iterable[Any]) -> list[str]:
    """A sentence for each setting of a config that makes numbers which the weights do not bound.

    epsilons: of the norms.
    """
    return list(dict.fromkeys((*_epsilons(epsilons), *_rotary(config), *_window(config))))


def _epsilons(epsilons: Iterable[Any]) -> Iterator[str]:
    least, most = EPSILONS
    for found in epsilons:
        if type(found) not in (int, float) or not least <= found <= most:
            yield (
                f"its rms_norm_eps is {found!r}, which fp32 does not hold as a positive number with room to spare: a "
                f"norm of zeros may be NaN; from {least:.0e} on it is bounded"
            )


def _rotary(config: Mapping[str, Any]) -> Iterator[str]:
    try:
        check_rotary(config)
    except CheckpointError as error:
        yield str(error).rstrip(".")
    else:
        yield from unusual_settings(config)


def _window(config: Mapping[str, Any]) -> Iterator[str]:
    window = config.get("sliding_window")
    if config.get("use_sliding_window") and window is not None and not (type(window) is int and window > 0):
        yield f"its sliding_window is {window!r}: attention to no token at all may be NaN"


def residual_obstacles(residual: float, hidden: int) -> Iterator[str]:
    """Why the norms may not be computed in fp32: a bound of the residual stream whose squares do not add up there.

    A bound that is infinite has a reason of its own.
    """
    if math.isfinite(residual) and residual**2 * hidden >= FP32_MAX:
        yield f"the residual stream is bounded by {residual:.3g} only, and norms add its squares in fp32"
