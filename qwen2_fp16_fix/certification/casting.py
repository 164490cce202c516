"""What a cast of stored weights to float16 changes."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

MAGNITUDE = 0x7FFF  # of float16's bits: all but the sign. They order numbers as their magnitudes do
INFINITY, SMALLEST_NORMAL = 0x7C00, 0x0400  # as such bits; NaN lies above infinity
NUMBERS_AT_A_TIME = 2**19  # counted together; few enough for a core's cache

Cast = Callable[[str, Tensor], Tensor]  # a weight's name and values to its float16 values


def casting_losses(stored: Tensor) -> dict[str, int]:
    """How many numbers a cast to float16 makes infinite, zero or subnormal, and how many were not finite before.

    It counts bits, and looks at the numbers themselves only where something is lost: three comparisons of floats for
    each weight took most of the time of a certificate.
    """
    lost = Counter[str](overflow=0, flushed=0, subnormal=0, nonfinite=0)
    for part in torch.split(stored.reshape(-1), NUMBERS_AT_A_TIME):
        if part.numel():
            bits = part.half().view(torch.int16).bitwise_and(MAGNITUDE)
            _count_infinite(part, bits, lost)
            if stored.dtype != torch.float16:
                _count_small(part, bits, lost)
    return dict(lost)


def _count_infinite(part: Tensor, bits: Tensor, lost: Counter[str]) -> None:
    if int(bits.max()) >= INFINITY:
        before = part.abs()
        lost["nonfinite"] += part.numel() - int((before < math.inf).sum())
        lost["overflow"] += int((bits == INFINITY).sum()) - int((before == math.inf).sum())


def _count_small(part: Tensor, bits: Tensor, lost: Counter[str]) -> None:
    if small := int(torch.count_nonzero(bits < SMALLEST_NORMAL)):
        zeros = part.numel() - int(torch.count_nonzero(bits))
        lost["subnormal"] += small - zeros
        lost["flushed"] += zeros - (part.numel() - int(torch.count_nonzero(part)) if zeros else 0)
