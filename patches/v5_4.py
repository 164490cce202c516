"""transformers 5.4 to 5.23: `cache_position` is gone; the cache takes keys, values and the layer, nothing more."""

from typing import Any, ClassVar

from torch import Tensor, nn

from .attention import (
    InterfaceAttention,
    dropout_of,
    eager_attention,
    operands_for,
    ours_for,
    project_output,
)
from .attention_form import ALL_ATTENTION_FUNCTIONS, claim_keys
from .blocks import COMMON_PARTS
from .projections import rotated_projections


class Attention(InterfaceAttention):
    """Rotates in fp32 and rounds once into the cache. Eager scores are fp32; any other implementation is called."""

    stock_parameters: ClassVar = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
    sliding_window: int | None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, S, hidden) to the same shape, and the weights (B, H, S, K) if eager computed them."""
        form = claim_keys(self, hidden_states, past_key_values, marks_last=True)
        if form is None:
            stock: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
            return stock
        cos, sin = position_embeddings
        chosen = self.config._attn_implementation
        ours = ours_for(chosen)
        query, key, value = rotated_projections(self, hidden_states, cos, sin, form)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # vLLM reads this forward as text. It wants the table by this name, the result in a local, and one call of that
        # local with scaling=self.… and **kwargs: tests/patches/test_engine_rules.py.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention)
        if ours is not None:
            attend = ours
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
