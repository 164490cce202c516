"""Attention before 4.48, where each backend is a class of its own instead of a function to call."""

import functools
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attention import REQUIRED_NAMES, as_wide_as_keys, dropout_of, eager_attention, project_output
from .attention_form import Form, ScaledAttention
from .cached_keys import is_sink, stored_keys
from .caches import STOCK, claim_cache, note_keys
from .key_centring import CentredKeys
from .numerics import rotate, sdpa_operands, sdpa_takes_fp32, widen_mask
from .sdpa import attend_with_one_query, repeated


class AttendEagerly(ScaledAttention):
    """The part of an eager attention after the cache: fp32 scores, then the output projection."""

    stock_names: ClassVar = REQUIRED_NAMES
    head_dim: int
    layer_idx: int
    attention_dropout: float
    rotary_emb: nn.Module

    @property
    def score_scaling(self) -> float:
        """What scores are multiplied by."""
        return float(self.head_dim**-0.5 * 4.0**self.ranges.rotated)

    def attend(
        self, form: Form, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, Q, H, D or wider) and weights (B, H, Q, K)."""
        mask = None if mask is None else widen_mask(mask, key.shape[-2])
        query = as_wide_as_keys(query, form, None)
        return eager_attention(self, query, key, value, mask, self.score_scaling, dropout_of(self))

    def output(
        self,
        form: Form,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        with_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output (B, Q, hidden), and the weights if they are wanted; only eager attention has them."""
        if with_weights:
            output, weights = AttendEagerly.attend(self, form, query, key, value, mask)
        else:
            output, weights = self.attend(form, query, key, value, mask)
        output = project_output(self, output, hidden_states, value.dtype, form)
        return output, weights if with_weights else None


class AttendThroughSdpa(AttendEagerly):
    """The same part through torch's fused kernel, which accumulates its scores in fp32 itself."""

    def attend(
        self, form: Form, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, Q, H, D or wider); a fused kernel keeps no weights."""
        query = as_wide_as_keys(query, form, None if sdpa_takes_fp32(value) else value.dtype)
        return sdpa_attention(query, key, value, mask, self.score_scaling, dropout_of(self)), None


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """torch's fused attention. query (B, H, Q, D), key and value (B, G, K, D); returns (B, Q, H, D), not yet rounded.

    No mask means causal, unless there is a single query; these releases pass no mask or an additive one.
    """
    query, key, value, mask = sdpa_operands(query, key, value, mask)
    if query.shape[2] == 1:
        return attend_with_one_query(query, key, value, mask, scaling, dropout)
    groups = query.shape[1] // key.shape[1]
    key, value = repeated(key, groups), repeated(value, groups)
    if mask is not None:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()  # pytorch issue 112577
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )
    return output.transpose(1, 2)


def rotate_pair(
    key_shift: Tensor | None,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces stock's rotation, which before 4.45 gets whole tables and the positions.

    key_shift: (1, G, 1, D), or None.
    """
    if cos.dim() == 2:
        cos, sin = cos[position_ids], sin[position_ids]
    return rotate(query, cos, sin).to(query.dtype), rotate(key, cos, sin, key_shift).to(key.dtype)


def with_exact_rotation(stock_forward: types.FunctionType, key_shift: Tensor | None) -> Callable[..., Any]:
    """A stock forward whose name `apply_rotary_pos_emb` means `rotate_pair`; all else in it is stock's.

    It is made again for each call. A cached one would keep stock's globals as they were then, and tools for long
    sequences replace `_flash_attention_forward` among them later.
    """
    names = {**stock_forward.__globals__, "apply_rotary_pos_emb": functools.partial(rotate_pair, key_shift)}
    code, defaults, closure = stock_forward.__code__, stock_forward.__defaults__, stock_forward.__closure__
    return types.FunctionType(code, names, stock_forward.__name__, defaults, closure)


class FlashAttention(CentredKeys):
    """Stock's flash attention, unpadding and windows included, with the rotation in fp32 and the keys centred.

    Stock's code calls the projections, so their biases are rounded with the products, and o_proj is not scaled.
    """

    projects_exactly = False
    one_part = "FlashAttention2 before transformers 4.48 stores keys itself"
    layer_idx: int

    stock_parameters: ClassVar = ("hidden_states", "attention_mask", "position_ids", "past_key_value")
    stock_names: ClassVar = {*REQUIRED_NAMES, "_flash_attention_forward"}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the stock class."""
        own = STOCK if self.centre is None or is_sink(type(past_key_value)) else (self.centre.version, 0)
        mark = claim_cache(self, past_key_value, own, marks_last=False)
        key_shift = None if mark == STOCK else self.key_shift
        forward = with_exact_rotation(super().forward.__func__, key_shift)  # type: ignore[attr-defined]
        output = forward(self, hidden_states, attention_mask, position_ids, past_key_value, *args, **kwargs)
        if past_key_value is not None and (keys := stored_keys(past_key_value, self.layer_idx)) is not None:
            note_keys(keys, mark)
        return output
