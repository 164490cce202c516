"""The steps of a fixed attention after its cache. The module of each transformers range puts them into one forward.

A forward chooses a form and claims the cache (attention_form.py), runs stock's code if that is safe, projects and
rotates (projections.py), updates the cache, calls an implementation with the operands that it wants, and applies the
output projection.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import attention_form
from .autocast import runs_in_float16
from .errors import HalfPrecisionScoresError
from .numerics import (
    grouped_attention,
    laid_out_by_token,
    sdpa_operands,
    sdpa_takes_fp32,
    widen_mask,
)
from .replaced import WATCHED
from .scaling import casts_to_float16, linear_by_token, scaled_linear
from .sdpa import STOCK_SDPA, sdpa_attention
from .two_part_keys import widened_queries

#: Names that stock's attention must use. A release whose attention lacks one is refused: a fixed forward needs all.
REQUIRED_NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "apply_rotary_pos_emb", "update"}


class InterfaceAttention(attention_form.ScaledAttention):
    """What an attention has from 4.48 on, where one class calls the implementation that the user chose by name."""

    stock_names: ClassVar = {*REQUIRED_NAMES, "scaling", "sliding_window", "eager_attention_forward"}
    config: Any
    layer_idx: int
    scaling: float
    attention_dropout: float

    @property
    def score_scaling(self) -> float:
        """What scores are multiplied by."""
        return self.scaling * 4.0**self.ranges.rotated


def dropout_of(attention: Any) -> float:
    """The share of weights to drop: none outside training."""
    dropout: float = attention.attention_dropout if attention.training else 0.0
    return dropout


def operands_for(
    form: attention_form.Form,
    attend: Callable[..., Any],
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cos: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query (in fp32), key, value and mask in the dtypes, width and memory order that an implementation takes.

    attend: the implementation; name: what the user chose it by; cos: see `prepared_once`.
    """
    prepared = functools.partial(prepared_once, cos)
    if attend is eager_attention:
        mask = None if mask is None else prepared(widen_mask, mask, key.shape[-2])
        return as_wide_as_keys(query, form, None), key, value, mask
    if name == "sdpa" or attend is sdpa_attention:
        rounded = None if sdpa_takes_fp32(value) else value.dtype
        return sdpa_operands(as_wide_as_keys(query, form, rounded), key, value, mask, prepared)
    return laid_out_by_token(as_wide_as_keys(query, form, value.dtype), value.dtype), key, value, mask


def as_wide_as_keys(query: Tensor, form: attention_form.Form, rounded: torch.dtype | None) -> Tensor:
    """A query (B, H, S, D) in fp32 with the channels that split keys ask for. rounded: see `widened_queries`."""
    if form.split is None:
        return query
    return widened_queries(query, form.split.channels[:, : query.shape[1]], rounded)


def prepared_once(cos: Tensor, prepare: Callable[[Tensor, int], Tensor], mask: Tensor, key_length: int) -> Tensor:
    """`widen_mask` or `mask_to_minus_inf` of a mask, kept on the mask for the other layers of the same forward.

    cos: of this forward. Each forward makes a new tensor of it, so its identity tells forwards apart.
    """
    if torch.compiler.is_compiling():
        return prepare(mask, key_length)
    kept: Any = getattr(mask, "qwen2_fp16_prepared", None)
    if kept is None or kept[0] is not cos or kept[1:3] != (prepare, key_length):
        kept = (cos, prepare, key_length, prepare(mask, key_length))
        mask.qwen2_fp16_prepared = kept  # type: ignore[attr-defined]
    prepared: Tensor = kept[3]
    return prepared


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """fp32 scores behind the signature of transformers' attention interface, with a mask from `operands_for`.

    Returns the output (B, Q, H, D) and the weights (B, H, Q, K).
    """
    output, weights = grouped_attention(query, key, value, attention_mask, scaling, dropout)
    return output.transpose(1, 2).to(value.dtype, memory_format=torch.contiguous_format), weights


def implementation_of(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The implementation of that name from 4.48 to 5.3, whose table lacks eager; ours takes the place of stock's."""
    ours: Callable[..., tuple[Tensor, Tensor | None]] | None = eager_attention if name == "eager" else ours_for(name)
    return attention_form.ALL_ATTENTION_FUNCTIONS[name] if ours is None else ours


def ours_for(implementation: str | None) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """Our attention in place of the implementation of that name, if that is transformers' own eager or sdpa; else None.

    Raises what `is_stock_eager` raises.
    """
    if is_stock_eager(implementation):
        return eager_attention
    return sdpa_attention if scores_of(implementation) == "stock sdpa" else None


def is_stock_eager(implementation: str | None) -> bool:
    """Whether the implementation of that name is transformers' eager attention, which ours replaces.

    Raises HalfPrecisionScoresError for one that keeps its scores in float16 and cannot be replaced: transformers'
    paged eager attention, and its eager attention inside another function.
    """
    kind = scores_of(implementation)
    if kind == "paged":
        raise HalfPrecisionScoresError(
            f"attention implementation {implementation!r} keeps its scores in float16, where they overflow and this "
            "fix cannot reach them: use 'paged|sdpa' or a flash implementation for continuous batching."
        )
    if kind == "wrapped":
        raise HalfPrecisionScoresError(
            f"attention implementation {implementation!r} wraps transformers' eager attention, whose scores are "
            "float16, where they overflow and this fix cannot reach them: use 'eager', or register a function that "
            "computes its scores in float32 itself."
        )
    return kind == "stock"


def scores_of(implementation: str | None) -> str:
    """Whose scores an implementation computes: "stock", "wrapped" and "paged" keep them in float16.

    "stock sdpa" is transformers' own call of torch's fused attention; anything else is "own".
    """
    if implementation in ("paged|eager", "eager_paged"):
        return "paged"
    function = attention_form.ALL_ATTENTION_FUNCTIONS.get(implementation)
    if function is not None and function is STOCK_SDPA:
        return "stock sdpa"
    may_be = isinstance(function, (types.FunctionType, functools.partial)) or hasattr(function, "__wrapped__")
    return "own" if function is eager_attention or not may_be else _scores_of_function(function)


#: Compilers take the answer as a constant: they cannot trace questions about a function's code.
scores_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _scores_of_function(function: Any) -> str:
    inner, bare = function, True
    while isinstance(inner, functools.partial):
        bare = bare and not inner.args and not inner.keywords
        inner = inner.func
    unwrapped, eager = inspect.unwrap(inner), _essence(WATCHED.first.get("eager_attention_forward"))
    if eager is None:
        return "own"
    if _essence(unwrapped) == eager:
        return "stock" if bare and not hasattr(inner, "__wrapped__") else "wrapped"
    # A wrapper that another tool has made around an implementation: attribution tools wrap every entry of the table.
    around = [cell.cell_contents for cell in getattr(unwrapped, "__closure__", None) or () if cell != types.CellType()]
    return "wrapped" if any(_essence(inspect.unwrap(each)) == eager for each in around if callable(each)) else "own"


def _essence(function: Any) -> tuple[Any, ...] | None:
    """What a function computes, wherever it is defined: transformers repeats the same eager attention in each model."""
    code = getattr(function, "__code__", None)
    return None if code is None else (code.co_code, code.co_consts, code.co_names)


def project_output(
    attention: Any, output: Tensor, hidden_states: Tensor, dtype: torch.dtype, form: attention_form.Form
) -> Tensor:
    """o_proj of the heads' outputs (B, S, H, D or wider), times 2^-form.values, rounded to `dtype`.

    hidden_states (B, S, hidden): the input of the attention. Returns its shape, no longer scaled.
    """
    if form.split is not None:
        output = output[..., : attention.head_dim]
    output = output.reshape(*hidden_states.shape[:-1], -1).to(dtype)
    scale, exponent = attention.scale, form.values
    if not (runs_in_float16(output) or casts_to_float16(attention.o_proj, output)):
        projected: Tensor = attention.o_proj(output)  # exponent is 0
        return projected
    if scale is None:
        width = attention.config.num_attention_heads * attention.head_dim
        return linear_by_token(attention.o_proj, output.float() * 2.0**exponent, width)
    if exponent != scale.exponent:  # values of a cache from before this plan
        output = output * 2.0 ** (exponent - scale.exponent)
    if scale.exponent == 0:
        stock: Tensor = attention.o_proj(output)
        return stock
    return scaled_linear(attention.o_proj, output, scale.factor)
