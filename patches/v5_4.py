"""transformers 5.4 to 5.23: `cache_position` is gone and the cache takes keys, values and the layer, nothing more."""

from typing import Any, ClassVar

from torch import Tensor, nn

from .blocks import (
    ALL_ATTENTION_FUNCTIONS,
    COMMON_PARTS,
    PROJECTED,
    eager_attention,
    is_safe_in_stock,
    is_stock_eager,
    operands_for,
    project_output,
)
from .caches import claim_cache
from .keys import CentredKeys, rotated_projections, shift_for
from .scaling import Scaled


class Attention(CentredKeys, Scaled):
    """Rotates in fp32, rounds once into the cache; eager scores are fp32, any other implementation is called."""

    stock_parameters: ClassVar = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
    stock_names: ClassVar = {*PROJECTED, "scaling", "sliding_window", "eager_attention_forward"}
    config: Any
    layer_idx: int
    scaling: float
    attention_dropout: float
    sliding_window: int | None
    o_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, S, hidden) to the same shape, and the weights (B, H, S, K) where eager computed them."""
        plain = is_safe_in_stock(self, hidden_states)
        shift = None if plain else shift_for(self, past_key_values)
        shift = claim_cache(self, past_key_values, shift, marks_last=True)
        if plain:
            stock: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
            return stock
        chosen = self.config._attn_implementation
        stands_in = is_stock_eager(chosen)
        query, key, value = rotated_projections(self, hidden_states, *position_embeddings, shift)
        if past_key_values is not None:
            key, value = self.update_cache(past_key_values, key, value, kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention)
        if stands_in:
            attend = eager_attention
        output, weights = attend(
            self,
            *operands_for(attend, chosen, query, key, value, attention_mask, position_embeddings[0]),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return project_output(self, output.reshape(*hidden_states.shape[:-1], -1), value.dtype), weights

    def update_cache(self, cache: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Every key and value of this layer, the new ones included. kwargs: the layer's other arguments, from 5.24."""
        updated: tuple[Tensor, Tensor] = cache.update(key, value, self.layer_idx)
        return updated


PARTS: dict[str, type[nn.Module]] = {**COMMON_PARTS, "Qwen2Attention": Attention}
