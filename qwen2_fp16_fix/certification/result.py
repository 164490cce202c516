"""What `certify` returns: the bounds of each layer, what they prove, and what is in the way of a proof."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..results import Record, Result

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class LayerCertificate(Record):
    """The bounds of one layer, by site, in units of the values themselves. A bound that is infinite is None.

    The fixed layer's q, k and v are bounded without their biases; `value` is v, `biased_q` and `biased_k` are q and k
    with them. Stock's q, k and v have them. Stock has two sites more, which the fix keeps in fp32: `scores`, which
    eager attention stores before they are scaled, and `residual`. A layer that cannot be bounded has none of either.
    """

    layer: int
    exponents: dict[str, int]  # of the powers of two that keep the layer in range, by what they scale
    bounds: dict[str, float | None]
    headroom_bits: dict[str, float | None]  # how many times a bound could double
    proven: bool
    stock_headroom_bits: dict[str, float | None]
    stock_proven: bool
    reasons: list[str]  # why the layer is not proven


@dataclass(frozen=True, repr=False)
class Certificate(Result):
    """The result of `certify`."""

    proven: bool  # with the fix, no prompt can make it overflow
    verdict: str
    reasons: list[str]  # why it is not proven
    assumes: list[str]  # what a proof rests on beside the weights: how the model is loaded and run
    layers: list[LayerCertificate]
    logits: float | None  # the largest that any prompt can give; None without a head or without a finite bound
    casting: dict[str, dict[str, int]]  # by tensor, the numbers that a cast to float16 changes; others are left out
    scaled_layers: int  # with an exponent above 0
    max_exponent: int
    config: dict[str, int | float]  # the sizes of the model
    seconds: float
    language: str = "en"  # of the verdict and the page; not in `to_dict`

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data: what `certify --json` prints."""
        found = super().to_dict()
        del found["language"]
        return found

    def summary(self) -> str:
        """The verdict."""
        return self.verdict

    def __rich__(self) -> "RenderableType":
        """The verdict and what it rests on, on one screen."""
        return self._text("page_of")

    def details(self) -> "RenderableType":
        """The verdict and every reason, layer and tensor, for rich: what `certify --details` prints."""
        return self._text("details_of")

    def _text(self, name: str) -> "RenderableType":
        shown: RenderableType = getattr(importlib.import_module(f"{__package__}.text"), name)(self)
        return shown
