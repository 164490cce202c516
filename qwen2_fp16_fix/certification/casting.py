"""What a cast of stored weights to float16 changes."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
NUMBERS_AT_A_TIME = 2**19  # counted together; few enough for a core's cache

Cast = Callable[[str, Tensor], Tensor]  # a weight's name and values to its float16 values


def casting_losses(stored: Tensor) -> dict[str, int]:
    """How many numbers a cast to float16 makes infinite, zero or subnormal, and how many were not finite before."""
    lost = Counter[str](overflow=0, flushed=0, subnormal=0, nonfinite=0)
    for part in torch.split(stored.reshape(-1), NUMBERS_AT_A_TIME):
        before = part.abs()
        lost["nonfinite"] += part.numel() - int((before < math.inf).sum())
        if stored.dtype != torch.float16:
            after = part.half().abs()
            zeros = int((after == 0).sum())
            lost["overflow"] += int((after == math.inf).sum()) - int((before == math.inf).sum())
            lost["flushed"] += zeros - int((before == 0).sum())
            lost["subnormal"] += int((after < SMALLEST_NORMAL).sum()) - zeros
    return dict(lost)
