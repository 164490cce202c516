"""The parts of a Qwen2 outside attention, the same for every transformers release: norm, decoder layer and MLP.

A fixed class is made of a class here and the stock class of the same role (`class Fixed(RMSNorm, stock.Qwen2RMSNorm)`),
so that `super()` is the stock code and `isinstance` still sees a stock module.

vLLM reads the forwards of `RMSNorm`, `DecoderLayer` and `MLP` as text before it runs a model. Each says what vLLM looks
for; tests/patches/test_engine_rules.py applies the same rules.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import planning
from .autocast import is_full_precision, runs_in_float16
from .layer_plan import Plan, drop_plan, expect_plan, forget_plan, watch_for_backward
from .linears import project_exactly
from .numerics import (
    may_reuse_memory,
    promote_residual,
    rms_norm,
    scaled_down,
    scaled_product,
)
from .overflow import OverflowWatch
from .replaced import notice_replaced
from .rotary import RotaryEmbedding
from .scaling import Scaled, casts_to_float16, holds_float16, is_quantised, linear_by_token, scaled_linear
from .symbolic import as_one_node, is_symbolic


class RMSNorm(nn.Module):
    """Normalises and multiplies by the gain in fp32 and rounds once. Stock rounds twice, and before the gain."""

    stock_parameters: ClassVar = ("hidden_states",)
    stock_names: ClassVar = {"weight", "variance_epsilon", "rsqrt"}
    kernel_layer_name: ClassVar = "Qwen2Fp16RMSNorm"  # under stock's name use_kernels=True would replace the norm
    weight: Tensor
    variance_epsilon: float
    watch: OverflowWatch | None = None  # of the final norm alone, which returns the last hidden state
    is_wide = False  # whether its output may exceed float16's range: then it is fp32, and attention or MLP scale it

    def forward(self, hidden_states: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """(..., hidden) in any dtype to (..., hidden) in `out_dtype`, by default the gain's, as the next matmul needs.

        A wide norm returns fp32 by default, unscaled.

        vLLM takes a forward with one parameter for a norm and replaces it by its own, which would pass the fp32
        residual on unrounded. The second parameter prevents that: tests/patches/test_engine_rules.py, `broken_by_norm`.
        """
        if is_symbolic(hidden_states):
            node: Tensor = as_one_node(self, hidden_states, (out_dtype,))
            return node
        weight = self.weight
        if weight.dtype != torch.float16:  # bf16 and fp32 do not overflow here: stock, bit for bit
            stock: Tensor = super().forward(hidden_states)
            normed = stock if out_dtype is None else stock.to(out_dtype)
        else:
            narrow = torch.float32 if self.is_wide else torch.float16
            normed = rms_norm(hidden_states, weight, self.variance_epsilon, out_dtype or narrow)
        if self.watch is not None:
            notice_replaced(normed)
            if runs_in_float16(normed):
                self.watch.note(normed)
        return normed

    def on_unfixed(self) -> None:
        """Ends the watch."""
        self.__dict__.pop("watch", None)
        self.__dict__.pop("is_wide", None)


class DecoderLayer(nn.Module):
    """Carries the residual stream in fp32: the input is promoted once and every residual add follows."""

    stock_parameters: ClassVar = ("hidden_states", "attention_mask", "position_ids")
    stock_names: ClassVar = {"residual", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    plan: Plan | None = None
    plan_due = False  # whether the next forward makes a plan
    traced = False  # whether a compiler has traced this layer
    rotary: Any = None  # the model's rotary embedding; kept in __dict__, so it is not a submodule of the layer
    watch: OverflowWatch  # over the model's last hidden state; no submodule either

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states (B, S, hidden). Checkpointing up to 4.51 passes the other arguments by position.

        vLLM refuses a layer that does not pass **kwargs on: tests/patches/test_engine_rules.py, `broken_by_layer`.
        """
        if is_symbolic(hidden_states):
            return as_one_node(self, hidden_states, args, kwargs)
        planning.settle_plan(self, hidden_states)
        output = super().forward(promote_residual(hidden_states), *args, **kwargs)
        watch_for_backward(self, output)
        return output

    def settle_in_trace(self, in_grad_mode: bool) -> bool:
        """Compilers call this and do not trace it. Before torch 2.13 they pass no module to a function, so a method."""
        planning.settle_in_trace(self, in_grad_mode)
        return True

    settle_in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> "DecoderLayer":
        """As nn.Module; if training has ended the plan, the first forward after `eval()` makes a new one."""
        super().train(mode)
        if not mode and (self.plan is None or self.plan.suspect):
            expect_plan(self)
        if self.traced:  # now, not at the next forward: compiled code must find the layer as it was traced
            planning.settle_for(self, mode)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        """As nn.Module. A layer that runs only as replicas settles its plan here: its own forward is not called."""
        planning.settle_plan(self)
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    def __setstate__(self, state: Any) -> None:
        """As nn.Module. A copied or unpickled layer has other weights than its plan was made for, so the plan ends."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        drop_plan(self, due=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "DecoderLayer":
        """Keeps the range plan through a move or a cast that leaves the weights' float16 values as they are."""
        with planning.plan_kept(self):
            super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As nn.Module. Loaded weights end the plan of the old ones, since compiled code does not look at weights."""
        if any(name.startswith(prefix) for name in state_dict):
            drop_plan(self, due=not self.traced)  # a new plan would invalidate compiled code a second time
        missing: list[str] = self.__dict__.pop("missing", [])  # see `note_missing`
        self.__dict__["missing"] = [name for name in missing if prefix + name not in state_dict]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def on_unfixed(self) -> None:
        """Forgets the range plan."""
        forget_plan(self)
        self.__dict__.pop("missing", None)


class MLP(Scaled):
    """SwiGLU whose product is scaled by the layer's exponent, or by each token's own if there is no plan.

    Where gate or up could exceed float16's range, they are computed from a scaled input and scaled back in fp32.
    """

    stock_parameters: ClassVar = ()
    stock_names: ClassVar = {"gate_proj", "up_proj", "down_proj", "act_fn", "intermediate_size"}
    intermediate_size: int
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    input_exponent = 0  # 2^-input_exponent scales the input; a plan sets it, and it stays when that ends

    def keep_input_exponent(self, exponent: int) -> None:
        """Keeps the exponent of the input; 0 for stock's arithmetic."""
        self.__dict__["input_exponent"] = exponent

    def runs_in_float16(self, hidden_states: Tensor) -> bool:
        """Whether float16 matmuls follow on this input. It is fp32 behind a wide norm, too."""
        if runs_in_float16(hidden_states) or casts_to_float16(self.down_proj, hidden_states):
            return True
        may_be_wide = self.input_exponent > 0 and is_full_precision(hidden_states)
        return may_be_wide and (holds_float16(self.gate_proj) or is_quantised(self.gate_proj))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, hidden) to the same shape: in stock's dtype if the exponent is 0, else in fp32, as the residual.

        vLLM fuses `act_fn(gate_proj(x)) * up_proj(x)` in one expression into a kernel whose product is float16. So the
        product is not written in one: tests/patches/test_engine_rules.py, `broken_by_mlp`.
        """
        if not self.runs_in_float16(hidden_states):
            stock: Tensor = super().forward(hidden_states)
            return stock
        if self.input_exponent > 0:
            return self.forward_scaled(hidden_states, self.input_exponent)
        gate, up = self.act_fn(self.gate_proj(hidden_states)), self.up_proj(hidden_states)
        scale = self.scale
        if scale is None:
            return linear_by_token(self.down_proj, gate.float() * up.float(), self.intermediate_size)
        memory = gate if may_reuse_memory(self.gate_proj, self.act_fn) else None
        if scale.exponent == 0:
            plain: Tensor = self.down_proj(torch.mul(gate, up, out=memory))
            return plain
        product = scaled_product(scale.zero, gate, up, scale.exponent, memory)
        return scaled_linear(self.down_proj, product, scale.factor)

    def forward_scaled(self, hidden_states: Tensor, exponent: int) -> Tensor:
        """`forward` with gate and up in fp32, of 2^-exponent times the input (B, S, hidden); see `keep_input_exponent`.

        The activation and the product are fp32, which holds numbers up to 2^48 · 65504², and are rounded once.
        """
        scaled = scaled_down(hidden_states, exponent)
        gate, up = (project_exactly(each, hidden_states, exponent, scaled) for each in (self.gate_proj, self.up_proj))
        gate, scale = self.act_fn(gate.float()), self.scale
        if scale is None:
            return linear_by_token(self.down_proj, gate * up, self.intermediate_size)
        product = scaled_product(scale.zero, gate, up, scale.exponent).to(torch.float16)
        if scale.exponent == 0:
            plain: Tensor = self.down_proj(product)
            return plain
        return scaled_linear(self.down_proj, product, scale.factor)


#: Stock class name to the class here that goes before it; a range module adds its attention.
COMMON_PARTS: dict[str, type[nn.Module]] = {
    "Qwen2RMSNorm": RMSNorm,
    "Qwen2DecoderLayer": DecoderLayer,
    "Qwen2MLP": MLP,
    "Qwen2RotaryEmbedding": RotaryEmbedding,
}
