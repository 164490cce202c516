"""transformers 4.56 to 5.3: the cache is called `past_key_values` and is told the rotation and the positions."""

from collections.abc import Callable
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

    stock_parameters: ClassVar = (
        "hidden_states",
        "position_embeddings",
        "attention_mask",
        "past_key_values",
        "cache_position",
    )
    stock_names: ClassVar = {*PROJECTED, "scaling", "sliding_window", "eager_attention_forward"}
    config: Any
    layer_idx: int
    scaling: float
    attention_dropout: float
    sliding_window: int | None
    o_proj: nn.Module

    def attention_interface(self, **kwargs: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The implementation the user chose; ours stands in for eager."""
        chosen = self.config._attn_implementation
        return eager_attention if chosen == "eager" or is_stock_eager(chosen) else ALL_ATTENTION_FUNCTIONS[chosen]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, S, hidden) to the same shape, and the weights (B, H, S, K) where eager computed them."""
        plain = is_safe_in_stock(self, hidden_states)
        shift = None if plain else shift_for(self, past_key_values)
        shift = claim_cache(self, past_key_values, shift, marks_last=False)
        if plain:
            stock: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, cache_position, **kwargs
            )
            return stock
        query, key, value = rotated_projections(self, hidden_states, *position_embeddings, shift)
        if past_key_values is not None:
            cos, sin = position_embeddings
            rotation = {"sin": sin, "cos": cos, "cache_position": cache_position}
            key, value = past_key_values.update(key, value, self.layer_idx, rotation)
        chosen, attend = self.config._attn_implementation, self.attention_interface(**kwargs)
        output, weights = attend(
            self,
            *operands_for(attend, chosen, query, key, value, attention_mask, position_embeddings[0]),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return project_output(self, output.reshape(*hidden_states.shape[:-1], -1), value.dtype), weights


PARTS: dict[str, type[nn.Module]] = {**COMMON_PARTS, "Qwen2Attention": Attention}
