"""In which form an attention computes and stores keys and values in one forward.

A form follows from the layer (its centre, split pairs and exponents), from the keys that the cache holds already, and
from what the attention implementation can take.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from .autocast import autocast_device, is_full_precision
from .cached_keys import is_sink, stored_width
from .caches import MIXED, STOCK, Mark, claim_cache, own_mark
from .errors import ForeignCacheError, HalfPrecisionScoresError
from .key_centring import CentredKeys
from .linears import inner_linear, is_separable
from .numerics import flex_pads
from .replaced import name_of
from .scaling import FLOAT_DTYPES, Ranges, Scaled, casts_to_float16
from .two_part_keys import MOST_PAIRS, Split

#: transformers' table of attention implementations, by name. Releases before 4.48 have none.
ALL_ATTENTION_FUNCTIONS: Any = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {})


class Form(NamedTuple):
    """How an attention computes and stores keys and values in one forward."""

    shift: Tensor | None  # added to rotated queries and keys, see `CentredKeys.shift`
    split: Split | None  # the pairs in two parts; None: keys have D channels
    mark: Mark  # of the cache
    values: int  # values are stored times 2^-values; as in the mark
    input: int = 0  # the projections read their input times 2^-input
    rotated: int = 0  # rotated queries and keys are stored times 2^-rotated each


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
    if attention.ranges.rotated and not is_known(attention.config._attn_implementation):
        raise HalfPrecisionScoresError(UNSCALED_SCORES.format(attention.config._attn_implementation))
    ranges, centre = attention.ranges, None if is_sink(type(cache)) else attention.centre
    if matmul_dtype(attention, hidden_states) != torch.float16:  # bfloat16 has the range
        ranges = Ranges(rotated=ranges.rotated)
    # Without a cache no version is read: a compiler would guard on it, and so compile each layer separately.
    own = (0, ranges.values) if cache is None else own_mark(centre, ranges)
    mark = claim_cache(attention, cache, own, marks_last)
    if mark == STOCK != own:
        if ranges.rotated:  # stock's keys are not scaled
            raise ForeignCacheError(MIXED.format(attention.layer_idx))
        centre = None
    split = None if centre is None else fitting_split(attention, cache, centre.split)
    return Form(None if centre is None else centre.shift, split, mark, mark[1], ranges.input, ranges.rotated)


#: vLLM, for one, reads the factor of the scores when it builds a model, before there is a plan.
UNSCALED_SCORES = (
    "rotated queries and keys of this checkpoint may exceed float16's range, so they are scaled down; attention "
    "implementation {!r} is not transformers' own and may not scale the scores back: use 'eager', 'sdpa' or a flash "
    "implementation."
)


def is_safe_in_stock(attention: Any, hidden_states: Tensor) -> bool:
    """Whether stock's attention computes on this activation in fp32 or wider, its output projection included."""
    if not is_full_precision(hidden_states) or casts_to_float16(attention.o_proj, hidden_states):
        return False
    # A norm whose output may exceed float16's range returns it in fp32.
    return not attention.ranges.input or matmul_dtype(attention, hidden_states) != torch.float16


def matmul_dtype(attention: Any, hidden_states: Tensor) -> torch.dtype:
    """The dtype in which the projections of an attention compute."""
    device = autocast_device(hidden_states.device.type)
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if hidden_states.dtype != torch.float32:
        return hidden_states.dtype
    dtype = getattr(getattr(inner_linear(attention.k_proj), "weight", None), "dtype", None)
    # Behind a wide norm it may have been quantised since the plan.
    is_half = dtype == torch.float16 or (attention.ranges.input > 0 and dtype not in FLOAT_DTYPES)
    return torch.float16 if is_half else torch.float32


def keep_constants_at(attention: Any, device: torch.device) -> None:
    """Moves the constants of an attention to where it runs: a tool may have moved weights one by one, past `_apply`."""
    centre, factor = attention.centre, attention.factor
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
    if held == width:
        reason = None
        if not is_known(attention.config._attn_implementation):
            raise ForeignCacheError(WIDER.format(width, attention.config._attn_implementation))
    elif held == attention.head_dim:
        reason = f"{type(cache).__name__} accepts, or already holds, only keys of {held} channels"
    elif held is None:
        reason = why_not_wider(attention.config._attn_implementation, width, flex_pads(attention.centre.shift))
    else:
        raise ForeignCacheError(MIXED.format(attention.layer_idx))
    if not torch.compiler.is_compiling() and reason != attention.one_part:
        attention.__dict__["one_part"] = reason  # for `key_state`
    return split if reason is None else None


WIDER = (
    "this cache holds keys in two parts, of {} channels, and attention implementation {!r}, which is not transformers' "
    "own, may expect heads of head_dim channels: run the prompt again with a new cache."
)


def is_known(implementation: str | None) -> bool:
    """Whether transformers, or this copy of the fix, defines the attention implementation of that name."""
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    while isinstance(function, functools.partial):
        function = function.func
    home = "transformers." if function is None else getattr(function, "__module__", None) or ""
    return home.startswith(("transformers.", f"{__package__}."))


is_known._dynamo_marked_constant = True  # type: ignore[attr-defined]


def described(implementation: str | None) -> str | None:
    """The name of an attention implementation, with its function if that is not transformers' own."""
    if is_known(implementation):
        return implementation
    return f"{implementation} ({name_of(ALL_ATTENTION_FUNCTIONS[implementation])})"


def why_not_wider(implementation: str | None, width: int, pads: bool) -> str | None:
    """Why an attention implementation is not given heads of `width` channels instead of head_dim; None if it is.

    pads: see `flex_pads`.
    """
    name = str(implementation)
    if not is_known(implementation):
        return f"{name} is not transformers' own and may expect heads of head_dim channels"
    if "paged" in name:
        return f"{name} allocates its cache by head_dim"
    if "flex" in name and pads:
        return f"{name} pads heads to a power of two"
    if width > 128 and ("flash_attention_4" in name or "flash-attn4" in name):
        return f"{name} takes heads of at most 128 channels on some GPUs"
    if width > 256 and name not in ("eager", "sdpa"):
        return f"{name} takes heads of at most 256 channels"
    return None


why_not_wider._dynamo_marked_constant = True  # type: ignore[attr-defined]


class KeyState(NamedTuple):
    """What `status` says of a layer's keys."""

    keys: str
    pairs_in_two_parts: int  # of each head
    pairs_left: int  # that ask for it and are not
    why_left: str | None


def key_state(attention: CentredKeys) -> KeyState:
    """How a layer stores its keys, and did in its last forward."""
    centre = attention.centre
    if centre is None:
        return KeyState("not centred", 0, 0, None)
    exact = attention.projects_exactly and is_separable(attention.q_proj) and is_separable(attention.k_proj)
    keys = "centred" if exact else "centred, bias rounded before"
    if centre.split is None:
        return KeyState(keys, 0, 0, None)
    pairs, left = centre.split.channels.shape[-1] // 2, centre.split.left
    if attention.one_part is not None:
        return KeyState(keys, 0, pairs + left, attention.one_part)
    return KeyState(keys, pairs, left, f"a head stores at most {MOST_PAIRS} pairs in two parts" if left else None)
