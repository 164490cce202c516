"""transformers 4.45 to 4.47: a class for each backend; the model computes the rotation once and passes it to layers."""

from typing import Any, ClassVar

from torch import Tensor, nn

from .attention_classes import AttendEagerly, AttendThroughSdpa, FlashAttention
from .attention_form import claim_keys
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
        "cache_position",
        "position_embeddings",
    )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        cache_position: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """hidden_states (B, S, hidden) to the same shape, the weights (B, H, S, K) if asked for, and the cache."""
        form = claim_keys(self, hidden_states, past_key_value, marks_last=False)
        if form is None:
            stock: tuple[Tensor, Tensor | None, Any] = super().forward(
                hidden_states,
                attention_mask,
                position_ids,
                past_key_value,
                output_attentions,
                use_cache,
                cache_position,
                position_embeddings,
            )
            return stock
        if position_embeddings is None:  # a caller written for 4.44, which these releases still serve
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        cos, sin = position_embeddings
        query, key, value = rotated_projections(self, hidden_states, cos, sin, form)
        if past_key_value is not None:
            rotation = {"sin": sin, "cos": cos, "cache_position": cache_position}
            key, value = past_key_value.update(key, value, self.layer_idx, rotation)
            note_keys(key, form.mark)
        output, weights = self.output(form, hidden_states, query, key, value, attention_mask, output_attentions)
        return output, weights, past_key_value


class SdpaAttention(AttendThroughSdpa, EagerAttention):
    """fp32 rotation, then torch's fused kernel."""


PARTS: dict[str, type[nn.Module]] = {
    **COMMON_PARTS,
    "Qwen2Attention": EagerAttention,
    "Qwen2SdpaAttention": SdpaAttention,
    "Qwen2FlashAttention2": FlashAttention,
}
