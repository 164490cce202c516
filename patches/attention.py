"""The steps of a fixed attention. The module of each transformers range puts them into one forward.

A forward claims the cache, runs stock's code if that is safe, projects and rotates, updates the cache, calls an
implementation with the operands that it wants, and applies the output projection.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from .caches import claim_cache
from .errors import HalfPrecisionScoresError
from .key_centring import CentredKeys, shift_for
from .linears import LINEAR_FORWARD, project_exactly
from .numerics import (
    grouped_attention,
    is_full_precision,
    laid_out_by_token,
    may_reuse_memory,
    rotate,
    runs_in_float16,
    sdpa_operands,
    widen_mask,
)
from .scaling import Scaled, casts_to_float16, linear_by_token, scaled_linear
from .sdpa import STOCK_SDPA, sdpa_attention

#: transformers' table of attention implementations, by name. Releases before 4.48 have none.
ALL_ATTENTION_FUNCTIONS: Any = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {})

#: Names that stock's attention must use. A release whose attention lacks one is refused: a fixed forward needs all.
REQUIRED_NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "apply_rotary_pos_emb", "update"}


class InterfaceAttention(CentredKeys, Scaled):
    """What an attention has from 4.48 on, where one class calls the implementation that the user chose by name."""

    stock_names: ClassVar = {*REQUIRED_NAMES, "scaling", "sliding_window", "eager_attention_forward"}
    config: Any
    layer_idx: int
    scaling: float
    attention_dropout: float
    o_proj: nn.Module


def claim_keys(attention: Any, hidden_states: Tensor, cache: Any, marks_last: bool) -> tuple[bool, Tensor | None]:
    """Whether stock's forward is to run, and the shift for new keys; the cache is marked as holding such keys.

    marks_last: see `claim_cache`, which raises ForeignCacheError.
    """
    runs_stock = is_safe_in_stock(attention, hidden_states)
    shift = None if runs_stock else shift_for(attention, cache)
    return runs_stock, claim_cache(attention, cache, shift, marks_last)


def is_safe_in_stock(attention: Any, hidden_states: Tensor) -> bool:
    """Whether stock's attention computes on this activation in fp32 or wider, its output projection included."""
    return is_full_precision(hidden_states) and not casts_to_float16(attention.o_proj, hidden_states)


def rotated_projections(
    attention: Any, hidden_states: Tensor, cos: Tensor, sin: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, S, D) in fp32, key and value (B, G, S, D) in the dtype of the matmuls.

    hidden_states (B, S, hidden). Query and key are rotated in fp32; keys get the shift (see `shift_for`) and are
    rounded once.
    """
    turned = rotate(queries_and_keys(attention, hidden_states), cos, sin, shift)
    value = attention.v_proj(hidden_states).view(*hidden_states.shape[:-1], -1, attention.head_dim).transpose(1, 2)
    query, key = turned.split_with_sizes((turned.shape[1] - value.shape[1], value.shape[1]), dim=1)
    return query, key.to(value.dtype), value


def queries_and_keys(attention: Any, hidden_states: Tensor) -> Tensor:
    """The heads of q_proj and then those of k_proj, (B, H + G, S, D), for one rotation; fp32 where biases are exact."""
    q_proj, k_proj, head_dim = attention.q_proj, attention.k_proj, attention.head_dim
    batch, length, _ = hidden_states.shape
    can_fuse = attention.one is not None and can_fuse_bias(q_proj) and can_fuse_bias(k_proj)
    if not (can_fuse and may_reuse_memory(q_proj, k_proj)):
        by_head = (batch, length, -1, head_dim)
        products = [project_exactly(each, hidden_states).view(by_head).transpose(1, 2) for each in (q_proj, k_proj)]
        return torch.cat(products, 1)
    if attention.one.device != hidden_states.device:  # a tool has moved the weights one by one, past `_apply`
        attention.keep_constants(attention.shift, hidden_states.device)
    sizes = [q_proj.out_features // head_dim, k_proj.out_features // head_dim]
    heads = torch.empty((batch, sum(sizes), length, head_dim), dtype=torch.float32, device=hidden_states.device)
    queries, keys = heads.split_with_sizes(sizes, 1)
    write_with_bias(q_proj, hidden_states, queries, attention.one)
    write_with_bias(k_proj, hidden_states, keys, attention.one)
    return heads


def can_fuse_bias(projection: Any) -> bool:
    """Whether a projection is a plain linear with a bias and a whole weight, no rank's shard."""
    if type(projection) is not nn.Linear or nn.Linear.forward is not LINEAR_FORWARD:
        return False
    parameters = projection._parameters  # a replica, a flat shard and a pruned linear have no weight here
    return type(parameters.get("weight")) is nn.Parameter and parameters.get("bias") is not None


def write_with_bias(linear: nn.Linear, hidden_states: Tensor, heads: Tensor, one: Tensor) -> None:
    """Writes linear(hidden_states), with its bias added in fp32, into fp32 heads (B, H, S, D).

    one: 1.0 in fp32, (1,). The kernel multiplies the bias by it, which makes the bias fp32 before it is added.
    """
    batch, _, length, head_dim = heads.shape
    product = nn.functional.linear(hidden_states, linear.weight).view(batch, length, -1, head_dim)
    torch.addcmul(product.transpose(1, 2), linear.bias.view(-1, 1, head_dim), one, out=heads)


def dropout_of(attention: Any) -> float:
    """The share of weights to drop: none outside training."""
    dropout: float = attention.attention_dropout if attention.training else 0.0
    return dropout


def operands_for(
    attend: Callable[..., Any],
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cos: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query (in fp32), key, value and mask in the dtypes and the memory order that an implementation takes.

    attend: the implementation; name: what the user chose it by; cos: see `prepared_once`.
    """
    prepared = functools.partial(prepared_once, cos)
    if attend is eager_attention:
        return query, key, value, None if mask is None else prepared(widen_mask, mask, key.shape[-2])
    if name == "sdpa" or attend is sdpa_attention:
        return sdpa_operands(query, key, value, mask, prepared)
    return laid_out_by_token(query, value.dtype), key, value, mask


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
    return ALL_ATTENTION_FUNCTIONS[name] if ours is None else ours


def ours_for(implementation: str | None) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """Our attention in place of the implementation of that name, if that is transformers' own eager or sdpa; else None.

    Raises what `is_stock_eager` raises.
    """
    if is_stock_eager(implementation):
        return eager_attention
    return sdpa_attention if scores_of(implementation) == "stock sdpa" else None


def is_stock_eager(implementation: str | None) -> bool:
    """Whether the implementation of that name is transformers' eager attention, whose place ours takes.

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
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if function is not None and function is STOCK_SDPA:
        return "stock sdpa"
    may_be = isinstance(function, (types.FunctionType, functools.partial)) or hasattr(function, "__wrapped__")
    return "own" if function is eager_attention or not may_be else _scores_of_function(function)


#: Compilers take the answer as a constant: they cannot trace questions about a function's code.
scores_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _scores_of_function(function: Any) -> str:
    from transformers.models.qwen2 import modeling_qwen2  # here, since this file is imported on releases without Qwen2

    inner, bare = function, True
    while isinstance(inner, functools.partial):
        bare = bare and not inner.args and not inner.keywords
        inner = inner.func
    code = _essence(inspect.unwrap(inner))
    if code is None or code != _essence(modeling_qwen2.eager_attention_forward):
        return "own"
    return "stock" if bare and not hasattr(inner, "__wrapped__") else "wrapped"


def _essence(function: Any) -> tuple[Any, ...] | None:
    """What a function computes, wherever it is defined: transformers repeats the same eager attention in each model."""
    code = getattr(function, "__code__", None)
    return None if code is None else (code.co_code, code.co_consts, code.co_names)


def project_output(attention: Any, output: Tensor, dtype: torch.dtype) -> Tensor:
    """o_proj of the heads' outputs (B, S, H·D), rounded to `dtype`, scaled by the exponent of the layer's plan.

    Returns (B, S, hidden).
    """
    output, scale = output.to(dtype), attention.scale
    if (scale is not None and scale.exponent == 0) or not (
        runs_in_float16(output) or casts_to_float16(attention.o_proj, output)
    ):
        projected: Tensor = attention.o_proj(output)
        return projected
    if scale is None:
        width = attention.config.num_attention_heads * attention.head_dim
        return linear_by_token(attention.o_proj, output.float(), width)
    return scaled_linear(attention.o_proj, output * 2.0**-scale.exponent, scale.factor)
