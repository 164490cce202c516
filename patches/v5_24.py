"""transformers from 5.24: the cache is called `cache`, and is handed the layer's other arguments."""

from typing import Any, ClassVar

from torch import Tensor, nn

from .blocks import COMMON_PARTS
from .v5_4 import Attention as AttentionFrom5_4


class Attention(AttentionFrom5_4):
    """The attention of 5.4 behind the newer name of the cache argument."""

    stock_parameters: ClassVar = ("hidden_states", "position_embeddings", "attention_mask", "cache")

    def forward(  # type: ignore[override]  # the name is the difference
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As in 5.4; stock's forward below it is called by position. Takes the older name, as stock does until 5.40."""
        cache = kwargs.pop("past_key_values", cache)
        return super().forward(hidden_states, position_embeddings, attention_mask, cache, **kwargs)

    def update_cache(self, cache: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Every key and value of this layer, the new ones included."""
        updated: tuple[Tensor, Tensor] = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        return updated


PARTS: dict[str, type[nn.Module]] = {**COMMON_PARTS, "Qwen2Attention": Attention}
