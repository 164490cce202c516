"""The largest magnitude at each site of a running Qwen2, and the first site that is not finite."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .sites import FLOAT16_MAX, Place, Watch

__all__ = ["FLOAT16_MAX", "Magnitudes"]


class Magnitudes(Watch):
    """While entered, records |x| at every site of every layer of `model`.

    The largest magnitude of a site is NaN or inf once a value there is.
    """

    def __init__(self, model: nn.Module) -> None:
        """model: any module with a Qwen2Model inside."""
        layers: Any = next(m.layers for m in model.modules() if hasattr(m, "layers"))
        super().__init__(dict(enumerate(layers)), self.note)
        self.found: dict[str, float] = {}

    def note(self, place: Place, tensor: Tensor) -> None:
        """Records the largest |tensor|, NaN where there is one."""
        largest = float(torch.abs(tensor.float()).max())
        before = self.found.get(str(place), 0.0)
        self.found[str(place)] = largest if math.isnan(largest) or largest > before else before

    def largest(self, count: int) -> list[dict[str, Any]]:
        """The `count` sites with the largest magnitudes, largest first."""
        ranked = sorted(self.found.items(), key=lambda item: -item[1])[:count]
        return [{"site": site, "magnitude": magnitude} for site, magnitude in ranked]

    def first_overflow(self) -> str | None:
        """The first site, in the order of execution, that held a value that is not finite."""
        return next((site for site, magnitude in self.found.items() if not math.isfinite(magnitude)), None)
