"""The parts of a Qwen2 that are fixed the same way in every transformers release.

Each class here is laid over the stock class of the same role (`class Fixed(RMSNorm, stock.Qwen2RMSNorm)`), so that
`super()` is the stock code and `isinstance` still sees a stock module.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from .errors import HalfPrecisionScoresError
from .layer_plan import Plan, drop_plan, expect_plan, forget_plan, watch_for_backward
from .numerics import (
    grouped_attention,
    is_full_precision,
    is_unwatched,
    laid_out_by_token,
    promote_residual,
    rms_norm,
    runs_in_float16,
    scaled_product,
    sdpa_operands,
    widen_mask,
)
from .overflow import OverflowWatch
from .planning import plan_kept, settle_for, settle_in_trace, settle_plan
from .scaling import Scaled, casts_to_float16, linear_by_token, scaled_linear

#: transformers' table of attention implementations, by name. Releases before 4.48 have none.
ALL_ATTENTION_FUNCTIONS: Any = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {})


class RMSNorm(nn.Module):
    """Normalises and multiplies by the gain in fp32 and rounds once. Stock rounds twice, and before the gain."""

    stock_parameters: ClassVar = ("hidden_states",)
    stock_names: ClassVar = {"weight", "variance_epsilon", "rsqrt"}
    kernel_layer_name: ClassVar = "Qwen2Fp16RMSNorm"  # by stock's, use_kernels=True would swap in another norm
    weight: Tensor
    variance_epsilon: float
    watch: OverflowWatch | None = None  # the final norm's: what it returns is the last hidden state

    def forward(self, hidden_states: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """(..., hidden) in any dtype to (..., hidden) in `out_dtype`, by default the gain's, as the next matmul needs.

        The second parameter also keeps engines that replace norms by pattern (one tensor in, one out) from
        swapping in one of their own, which would hand the fp32 residual on unrounded.
        """
        weight = self.weight
        if weight.dtype != torch.float16:  # bf16 and fp32 do not overflow here: stock, bit for bit
            stock: Tensor = super().forward(hidden_states)
            normed = stock if out_dtype is None else stock.to(out_dtype)
        else:
            normed = rms_norm(hidden_states, weight, self.variance_epsilon, out_dtype or weight.dtype)
        if self.watch is not None and runs_in_float16(normed):
            self.watch.note(normed)
        return normed

    def release(self) -> None:
        """Ends the watch."""
        self.__dict__.pop("watch", None)


class DecoderLayer(nn.Module):
    """Carries the residual stream in fp32: the input is promoted once and every residual add follows."""

    stock_parameters: ClassVar = ("hidden_states", "attention_mask", "position_ids")
    stock_names: ClassVar = {"residual", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    plan: Plan | None = None
    plan_due = False  # whether the next forward makes one
    traced = False  # by a compiler
    rotary: Any  # the model's rotary embedding, and the watch over its last hidden state: no submodules of this one
    watch: OverflowWatch

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states (B, S, hidden). Arguments keep their order: checkpointing up to 4.51 passes them as such."""
        settle_plan(self)
        output = super().forward(promote_residual(hidden_states), *args, **kwargs)
        watch_for_backward(self, output)
        return output

    def settle_in_trace(self, in_grad_mode: bool) -> bool:
        """What compilers run instead of tracing it. A method: before torch 2.13 they hand no module to a function."""
        settle_in_trace(self, in_grad_mode)
        return True

    settle_in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> "DecoderLayer":
        """As nn.Module; where training has ended the plan, the first forward after `eval()` makes a new one."""
        super().train(mode)
        if not mode and (self.plan is None or self.plan.suspect):
            expect_plan(self)
        if self.traced:  # now: what is compiled must find the layer as it was traced
            settle_for(self, mode)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        """As nn.Module; of a layer that runs in replicas alone, this is where its next forward begins."""
        settle_plan(self)
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    def __setstate__(self, state: Any) -> None:
        """As nn.Module; a copy or what comes out of a file has other weights than those that were planned for."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        drop_plan(self, due=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "DecoderLayer":
        """Keeps the range plan through a move or a cast that leaves the weights' float16 values as they are."""
        with plan_kept(self):
            super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As nn.Module; weights that are loaded end the plan made for the old ones, which compiled code cannot see."""
        if any(name.startswith(prefix) for name in state_dict):
            drop_plan(self, due=not self.traced)  # else each load would end what is compiled, once more when planned
        missing: list[str] = self.__dict__.pop("missing", [])  # see `note_missing`
        self.__dict__["missing"] = [name for name in missing if prefix + name not in state_dict]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def release(self) -> None:
        """Forgets the range plan."""
        forget_plan(self)
        self.__dict__.pop("missing", None)


class MLP(Scaled):
    """SwiGLU whose product is scaled by the layer's exponent, or by each token's own where there is no plan."""

    stock_parameters: ClassVar = ()
    stock_names: ClassVar = {"gate_proj", "up_proj", "down_proj", "act_fn", "intermediate_size"}
    intermediate_size: int
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, hidden) to the same shape: stock's arithmetic with exponent 0, else fp32 for the residual."""
        if not runs_in_float16(hidden_states) and not casts_to_float16(self.down_proj, hidden_states):
            stock: Tensor = super().forward(hidden_states)
            return stock
        gate, up = self.act_fn(self.gate_proj(hidden_states)), self.up_proj(hidden_states)
        scale = self.scale
        if scale is None:
            return linear_by_token(self.down_proj, gate.float() * up.float(), self.intermediate_size)
        memory = gate if is_unwatched(self.gate_proj, self.act_fn) else None
        if scale.exponent == 0:
            plain: Tensor = self.down_proj(torch.mul(gate, up, out=memory))
            return plain
        product = scaled_product(scale.zero, gate, up, scale.exponent, memory)
        return scaled_linear(self.down_proj, product, scale.factor)


#: RoPE variants whose frequencies no forward changes.
UNCHANGING = ("default", "linear", "yarn", "llama3", "proportional")


class RotaryEmbedding(nn.Module):
    """Cosine and sine tables in fp32, whatever dtype the model has or is cast to (releases from 4.45)."""

    stock_parameters: ClassVar = ("x", "position_ids")
    stock_names: ClassVar = {"inv_freq", "attention_scaling", "config", "rope_type"}
    config: Any
    rope_type: str
    attention_scaling: float

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids (B, S) to cos and sin (B, S, D), in fp32 whatever the dtype of `x`; fp32 models get stock's.

        Up to 5.17 or later stock's angles are a matmul, whose operands TF32 would round: position 16,001 to 16,000.
        """
        if is_full_precision(x):
            stock: tuple[Tensor, Tensor] = super().forward(x, position_ids)
            return stock
        if self.rope_type not in UNCHANGING:  # stock chooses the frequencies by the farthest position
            super().forward(x, position_ids.amax().view(1, 1).float())  # an integer's would be in torch's default dtype
        angles = position_ids[..., None] * self.frequencies().to(x.device, torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def frequencies(self) -> Tensor:
        """Radians a token of each pair, (D/2,)."""
        return self._buffers["inv_freq"]  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "RotaryEmbedding":
        """Follows `.to(device)` but not a cast: `.half()` would round the frequencies and turn far positions wrong."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != exact.dtype:
                self.rounded[name] = after
                self._buffers[name] = exact.to(after.device)
            elif name in self.rounded:
                self.rounded[name] = fn(self.rounded[name])
        return self

    def adopt(self, stock: type[nn.Module]) -> None:
        """Takes over from the class `stock`: frequencies a cast has rounded are computed anew, the old kept aside."""
        self.rounded: dict[str, Tensor] = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and buffer.dtype != torch.float32 and buffer.device.type != "meta"
        }
        if self.rounded:
            with torch.device("cpu"):  # not where a user's default device is
                exact = dict(stock(config=self.config).named_buffers())
            for name, buffer in self.rounded.items():
                self._buffers[name] = exact[name].to(buffer.device)

    def release(self) -> None:
        """Leaves the buffers as stock would have them by now."""
        self._buffers.update(self.__dict__.pop("rounded", {}))


#: Names that stock's attention uses if `rotated_projections` and what follows it can stand in for its own.
PROJECTED = {"q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "apply_rotary_pos_emb", "update"}


def is_safe_in_stock(attention: Any, hidden_states: Tensor) -> bool:
    """Whether stock's attention computes on this activation in fp32 or wider, its output projection included."""
    return is_full_precision(hidden_states) and not casts_to_float16(attention.o_proj, hidden_states)


def project_output(attention: Any, output: Tensor, dtype: torch.dtype) -> Tensor:
    """o_proj of the heads' outputs (B, S, H·D), rounded to `dtype`, scaled as the layer's plan says: (B, S, hidden)."""
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


def operands_for(
    attend: Callable[..., Any],
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    forward: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """An fp32 query, key, value and mask as `attend`, chosen as `name`, wants them.

    forward: the rotation tables, which tell this forward of the model from others.
    """
    prepared = functools.partial(prepared_once, forward)
    if attend is eager_attention:
        return query, key, value, None if mask is None else prepared(widen_mask, mask, key.shape[-2])
    if name == "sdpa":
        return sdpa_operands(query, key, value, mask, prepared)
    return laid_out_by_token(query, value.dtype), key, value, mask


def prepared_once(forward: Tensor, prepare: Callable[[Tensor, int], Tensor], mask: Tensor, key_length: int) -> Tensor:
    """`widen_mask` or `seal_mask`, kept on the mask for the other layers of the same forward."""
    if torch.compiler.is_compiling():
        return prepare(mask, key_length)
    kept: Any = getattr(mask, "qwen2_fp16_prepared", None)
    if kept is None or kept[0] is not forward or kept[1:3] != (prepare, key_length):
        kept = (forward, prepare, key_length, prepare(mask, key_length))
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


def is_stock_eager(implementation: str | None) -> bool:
    """Whether the implementation of that name is transformers' eager attention, which ours stands in for.

    Raises HalfPrecisionScoresError for one that keeps its scores in float16 and cannot be stood in for: transformers'
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
    """Who keeps the scores of the implementation of that name: "stock", "wrapped" or "paged" in float16, else "own"."""
    if implementation in ("paged|eager", "eager_paged"):
        return "paged"
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    may_be = isinstance(function, (types.FunctionType, functools.partial)) or hasattr(function, "__wrapped__")
    return "own" if function is eager_attention or not may_be else _scores_of_function(function)


#: Compilers take the answer as a constant: they cannot trace what is asked about a function's code.
scores_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _scores_of_function(function: Any) -> str:
    from transformers.models.qwen2 import modeling_qwen2  # here, since a release without Qwen2 gets to the imports

    inner, bare = function, True
    while isinstance(inner, functools.partial):
        bare = bare and not inner.args and not inner.keywords
        inner = inner.func
    code = _essence(inspect.unwrap(inner))
    if code is None or code != _essence(modeling_qwen2.eager_attention_forward):
        return "own"
    return "stock" if bare and not hasattr(inner, "__wrapped__") else "wrapped"


def _essence(function: Any) -> tuple[Any, ...] | None:
    """What a function computes: transformers has the same eager attention in the module of each model."""
    code = getattr(function, "__code__", None)
    return None if code is None else (code.co_code, code.co_consts, code.co_names)


#: The stock class names and what is laid over each; a range module adds its attention.
COMMON_PARTS: dict[str, type[nn.Module]] = {
    "Qwen2RMSNorm": RMSNorm,
    "Qwen2DecoderLayer": DecoderLayer,
    "Qwen2MLP": MLP,
    "Qwen2RotaryEmbedding": RotaryEmbedding,
}
