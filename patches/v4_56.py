"""transformers 4.56 to 5.3: as 4.53, but the cache argument is called `past_key_values`."""

from typing import Any, ClassVar

from torch import Tensor, nn

from .attention import (
    InterfaceAttention,
    dropout_of,
    implementation_of,
    operands_for,
    project_output,
)
from .attention_form import claim_keys
from .blocks import COMMON_PARTS
from .projections import rotated_projections


class Attention(InterfaceAttention):
    """Rotates in fp32 and rounds once into the cache. Eager scores are fp32; any other implementation is called."""

    stock_parameters: ClassVar = (
        "hidden_states",
        "position_embeddings",
        "attention_mask",
        "past_key_values",
        "cache_position",
    )
    sliding_window: int | None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, S, hidden) to the same shape, and the weights (B, H, S, K) if eager computed them."""
        past_key_values = kwargs.pop("past_key_value", past_key_values)  # the older name, which stock takes up to 4.57
        form = claim_keys(self, hidden_states, past_key_values, marks_last=False)
        if form is None:
            stock: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, cache_position, **kwargs
            )
            return stock
        cos, sin = position_embeddings
        query, key, value = rotated_projections(self, hidden_states, cos, sin, form)
        if past_key_values is not None:
            rotation = {"sin": sin, "cos": cos, "cache_position": cache_position}
            key, value = past_key_values.update(key, value, self.layer_idx, rotation)
        chosen = self.config._attn_implementation
        attend = implementation_of(chosen)
        output, weights = attend(
            self,
            *operands_for(form, attend, chosen, query, key, value, attention_mask, cos),
            dropout=dropout_of(self),
            scaling=self.score_scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return project_output(self, output, hidden_states, value.dtype, form), weights


PARTS: dict[str, type[nn.Module]] = {**COMMON_PARTS, "Qwen2Attention": Attention}
