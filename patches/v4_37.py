"""transformers 4.37 to 4.44: a class for each backend; each layer holds its rotation tables and picks rows."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attention_classes import AttendEagerly, AttendThroughSdpa, FlashAttention
from .attention_form import claim_keys
from .autocast import is_full_precision
from .blocks import COMMON_PARTS
from .caches import note_keys
from .projections import rotated_projections


class EagerAttention(AttendEagerly):
    """fp32 rotation and scores. The sdpa class comes here too when attention weights are asked for."""

    stock_parameters: ClassVar = (
        "hidden_states",
        "attention_mask",
        "position_ids",
        "past_key_value",
        "output_attentions",
        "use_cache",
    )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """hidden_states (B, S, hidden) to the same shape, the weights (B, H, S, K) if asked for, and the cache."""
        form = claim_keys(self, hidden_states, past_key_value, marks_last=False)
        if form is None:
            stock: tuple[Tensor, Tensor | None, Any] = super().forward(
                hidden_states, attention_mask, position_ids, past_key_value, output_attentions, use_cache, **kwargs
            )
            return stock
        length = hidden_states.shape[1]
        if past_key_value is not None:
            length += past_key_value.get_usable_length(length, self.layer_idx)
        cos, sin = self.rotary_emb(hidden_states, seq_len=length)
        query, key, value = rotated_projections(self, hidden_states, cos[position_ids], sin[position_ids], form)
        if past_key_value is not None:
            rotation = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
            key, value = past_key_value.update(key, value, self.layer_idx, rotation)
            note_keys(key, form.mark)
        output, weights = self.output(form, hidden_states, query, key, value, attention_mask, output_attentions)
        return output, weights, past_key_value


class SdpaAttention(AttendThroughSdpa, EagerAttention):
    """fp32 rotation, then torch's fused kernel."""


class RotaryEmbedding(nn.Module):
    """Cosine and sine tables in fp32. Stock's are rounded to the dtype the model was built in."""

    stock_parameters: ClassVar = ("x", "seq_len")
    stock_names: ClassVar = {"cos_cached", "sin_cached", "base", "dim"}
    dim: int
    base: float
    cos_cached: Tensor
    exact_tables: tuple[Tensor, Tensor] | None = None  # not buffers: a cast of the model must not reach them

    def forward(self, x: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        """cos and sin (seq_len, D) in fp32, on the device of `x`; fp32 models get stock's."""
        if is_full_precision(x) and not self.cos_cached.is_meta:  # no checkpoint holds the tables
            stock: tuple[Tensor, Tensor] = super().forward(x, seq_len)
            return stock
        tables = self.exact_tables
        if tables is None or len(tables[0]) < seq_len or tables[0].device != x.device:
            with torch.inference_mode(False):  # a table first made under inference mode must serve training as well
                tables = self.exact_tables = self.compute(max(seq_len, 2048), x.device)
        return tables[0][:seq_len], tables[1][:seq_len]

    def restore(self, device: torch.device) -> bool:
        """Does nothing: the exact tables are computed from plain numbers, not from tensors."""
        return True

    def on_fixed(self, stock: type[nn.Module]) -> None:
        """Leaves stock's tables alone: the exact ones are made at the first call."""

    def on_unfixed(self) -> None:
        """Drops the exact tables."""
        self.__dict__.pop("exact_tables", None)

    def frequencies(self, device: torch.device | str = "cpu") -> Tensor:
        """Radians a token of each pair, base^(-2i/D) (Su et al. 2021, section 3.2.2): (D/2,) in fp32."""
        return 1.0 / (self.base ** (torch.arange(0, self.dim, 2, device=device).float() / self.dim))

    def compute(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (length, D) of position times frequency."""
        angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), self.frequencies(device))
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


PARTS: dict[str, type[nn.Module]] = {
    **COMMON_PARTS,
    "Qwen2RotaryEmbedding": RotaryEmbedding,
    "Qwen2Attention": EagerAttention,
    "Qwen2SdpaAttention": SdpaAttention,
    "Qwen2FlashAttention2": FlashAttention,
}
