"""In which form an attention computes and stores keys and values in one forward.

A form follows from the layer (its centre, split pairs and exponents), from the keys that the cache holds already, and
from what the attention implementation can take.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from .caches import MIXED, STOCK, Mark, claim_cache, is_sink, stored_width
from .errors import ForeignCacheError
from .key_centring import CentredKeys
from .linears import inner_linear
from .numerics import autocast_is_on, is_full_precision, runs_in_float16
from .scaling import Ranges, Scaled, casts_to_float16
from .two_part_keys import Split

#: transformers' table of attention implementations, by name. Releases before 4.48 have none.
ALL_ATTENTION_FUNCTIONS: Any = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {})


class Form(NamedTuple):
    """How an attention computes and stores keys and values in one forward."""

    shift: Tensor | None  # added to rotated queries and keys, see `CentredKeys.shift`
    split: Split | None  # the pairs in two parts; None: keys have D channels
    mark: Mark  # of the cache; its second number is the exponent of the values
    input: int = 0  # the projections read their input times 2^-input
    rotated: int = 0  # rotated queries and keys are stored times 2^-rotated each

    @property
    def values(self) -> int:
        """Values are stored times 2^-values."""
        return self.mark[1]


class ScaledAttention(CentredKeys, Scaled):
    """An attention that has exponents for its input, its values and its rotated queries and keys."""

    ranges: Ranges = Ranges()
    factor: Tensor | None = None  # 2^ranges.input, (1,) in fp32, on the device of the weights
    o_proj: nn.Module

    def keep_ranges(self, ranges: Ranges, device: torch.device | None = None) -> None:
        """Keeps exponents from now on. A plan that ends leaves them, as it leaves the centre."""
        factor = torch.full((1,), 2.0**ranges.input, dtype=torch.float32, device=device)
        held = self.factor
        if held is None or self.ranges != ranges or held.device != factor.device:  # a captured graph may hold the old
            self.__dict__.update(ranges=ranges, factor=factor)

    def on_unfixed(self) -> None:
        """Forgets the centre and the exponents."""
        super().on_unfixed()
        for constant in ("ranges", "factor"):
            self.__dict__.pop(constant, None)


def claim_keys(attention: Any, hidden_states: Tensor, cache: Any, marks_last: bool) -> Form | None:
    """The form of new keys and values; None if stock's forward is to run. The cache is marked as holding such keys.

    marks_last: see `claim_cache`, which raises ForeignCacheError.
    """
    if is_safe_in_stock(attention, hidden_states):
        claim_cache(attention, cache, STOCK, marks_last)
        return None
    keep_constants_at(attention, hidden_states.device)
    ranges, centre = attention.ranges, None if is_sink(cache) else attention.centre
    if matmul_dtype(attention, hidden_states) != torch.float16:  # bfloat16 has the range
        ranges = Ranges(rotated=ranges.rotated)
    own = (0 if centre is None else centre.version, ranges.values)
    mark = claim_cache(attention, cache, own, marks_last)
    if mark == STOCK != own:
        if ranges.rotated:  # stock's keys are not scaled
            raise ForeignCacheError(MIXED.format(attention.layer_idx))
        centre = None
    split = None if centre is None else fitting_split(attention, cache, centre.split)
    return Form(None if centre is None else centre.shift, split, mark, ranges.input, ranges.rotated)


def is_safe_in_stock(attention: Any, hidden_states: Tensor) -> bool:
    """Whether stock's attention computes on this activation in fp32 or wider, its output projection included."""
    if not is_full_precision(hidden_states) or casts_to_float16(attention.o_proj, hidden_states):
        return False
    # A norm whose output may pass float16's range hands it over in fp32.
    return not attention.ranges.input or matmul_dtype(attention, hidden_states) != torch.float16


def matmul_dtype(attention: Any, hidden_states: Tensor) -> torch.dtype:
    """The dtype in which the projections of an attention compute."""
    if runs_in_float16(hidden_states):
        return torch.float16
    if hidden_states.dtype != torch.float32 or autocast_is_on(hidden_states.device.type):
        return hidden_states.dtype
    weight = getattr(inner_linear(attention.k_proj), "weight", None)
    return torch.float16 if getattr(weight, "dtype", None) == torch.float16 else torch.float32


def keep_constants_at(attention: Any, device: torch.device) -> None:
    """Moves the constants of an attention to where it runs: a tool may have moved weights one by one, past `_apply`."""
    centre, factor = attention.centre, attention.factor
    if device.type == "meta":
        return
    if centre is not None and centre.shift.device != device:
        attention.keep_centre(centre, device)
    if factor is not None and factor.device != device:
        attention.keep_ranges(attention.ranges, device)


def fitting_split(attention: Any, cache: Any, split: Split | None) -> Split | None:
    """The pairs in two parts of the keys that go into a cache; None if they are to have D channels.

    Keys that the cache holds decide. Without any, the kind of the cache does, and the implementation.
    """
    if split is None:
        return None
    width = attention.head_dim + split.extra
    held = None if cache is None else stored_width(attention, cache)
    if held is not None and held not in (width, attention.head_dim):
        raise ForeignCacheError(MIXED.format(attention.layer_idx))
    on_cpu = attention.centre.shift.device.type == "cpu"
    is_wide = held == width if held is not None else takes_width(attention.config._attn_implementation, width, on_cpu)
    return split if is_wide else None


def takes_width(implementation: str | None, width: int, on_cpu: bool) -> bool:
    """Whether an attention implementation takes heads that are wider than head_dim.

    Of one that transformers does not define nothing is known. flex_attention pads to a power of two on a GPU, flash
    kernels end at 256, and the cache of paged attention is allocated by head_dim.
    """
    name, function = str(implementation), ALL_ATTENTION_FUNCTIONS.get(implementation)
    while isinstance(function, functools.partial):
        function = function.func
    home = "transformers." if function is None else getattr(function, "__module__", None) or ""
    if not home.startswith(("transformers.", f"{__package__}.")):
        return False
    if "paged" in name:
        return False
    if "flex" in name:
        return on_cpu
    return name in ("eager", "sdpa") or width <= 256


takes_width._dynamo_marked_constant = True  # type: ignore[attr-defined]
