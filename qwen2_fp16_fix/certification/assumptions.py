"""What the bounds of weights assume of a config, and what a certificate assumes of how a model is run."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoints.rotary import check_rotary, unusual_settings
from ..errors import CheckpointError, quoted

EPSILON = 1e-6  # of a config that names none
#: A norm divides by the root of a mean square plus epsilon, in fp32. Squares below 2^-126 may count as 0 there, which
#: is 2^-26 of the least epsilon: the bounds have room for that. Above the largest, torch may refuse to make the number.
EPSILONS = (2.0**-100, 1e30)
FP32_MAX = 2.0**128
BY_TOKEN = (
    "every layer has its whole weights and keeps its exponents: layers that are offloaded, sharded, quantised, adapted "
    "or trained scale by token, which is not proven"
)


#: Of a config: of the attention weights, and of what a head for tokens reads.
DROPOUTS = ("attention_dropout", "classifier_dropout", "hidden_dropout")


@dataclass(frozen=True)
class Assumptions:
    """What a proof rests on beside the weights."""

    positions: int  # tokens, those of the answer included
    dropouts: tuple[str, ...]  # what training drops, in sentences

    def sentences(self) -> list[str]:
        """Each in a sentence."""
        longest = f"prompt and answer together are no longer than {self.positions:,} tokens"
        return [longest, BY_TOKEN, *(f"it is not in training: {dropout}" for dropout in self.dropouts)]


def assumptions_of(config: Mapping[str, Any], positions: int) -> Assumptions:
    """What a proof assumes of a model with that config."""
    return Assumptions(positions, tuple(text for name in DROPOUTS if (text := dropout_text(name, config.get(name)))))


def dropout_text(name: str, share: Any) -> str | None:
    """What dropout does in training to the numbers that it keeps. None if it drops nothing."""
    if not isinstance(share, int | float) or not 0 < share < 1:  # with a share of 1 nothing is left but zeros
        return None
    return f"its {name} of {share:g} makes what it keeps {1 / (1 - share):.3g} times as large"


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
                f"its rms_norm_eps is {quoted(found)}, too small or too large for fp32, so a norm of zeros may be "
                f"NaN: values from {least:.0e} to {most:.0e} are bounded"
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
        yield f"its sliding_window is {quoted(window)}: attention to no token at all may be NaN"


def residual_obstacles(residual: float, hidden: int) -> Iterator[str]:
    """Why the norms may not be computed in fp32: a bound of the residual stream whose squares overflow there.

    A bound that is infinite has a reason of its own.
    """
    if math.isfinite(residual) and residual**2 * hidden >= FP32_MAX:
        yield f"the residual stream is bounded by {residual:.3g}, whose squares overflow when a norm adds them in fp32"
