"""transformers 4.53 to 4.55: as 4.56, but the cache argument is called `past_key_value`."""

from typing import Any, ClassVar

from torch import Tensor, nn

from .blocks import COMMON_PARTS
from .v4_56 import Attention as AttentionFrom4_56


class Attention(AttentionFrom4_56):
    """The attention of 4.56 behind the older name of the cache argument."""

    stock_parameters: ClassVar = (
        "hidden_states",
        "position_embeddings",
        "attention_mask",
        "past_key_value",
        "cache_position",
    )

    def forward(  # type: ignore[override]  # the name is the difference
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_value: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As in 4.56; stock's forward below it is called by position, so the name does not matter there."""
        return super().forward(
            hidden_states, position_embeddings, attention_mask, past_key_value, cache_position, **kwargs
        )


PARTS: dict[str, type[nn.Module]] = {**COMMON_PARTS, "Qwen2Attention": Attention}
