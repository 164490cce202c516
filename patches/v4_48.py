"""transformers 4.48 to 4.52: as 4.53, but sdpa hands over to eager for weights, a layer works out its window."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .blocks import COMMON_PARTS, eager_attention
from .v4_53 import Attention as AttentionFrom4_53


class Attention(AttentionFrom4_53):
    """The attention of 4.53 with the two things that were done inside the layer before."""

    @property
    def sliding_window(self) -> int | None:  # type: ignore[override]  # an attribute from 4.53
        """Tokens a fused kernel may look back on in this layer, or None for all of them."""
        if not self.config.use_sliding_window or self.layer_idx < self.config.max_window_layers:
            return None
        window: int | None = getattr(self.config, "sliding_window", None)
        return window

    def attention_interface(self, **kwargs: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The implementation the user chose, or eager where sdpa is asked for weights, which it does not keep."""
        if self.config._attn_implementation == "sdpa" and kwargs.get("output_attentions", False):
            return eager_attention
        return super().attention_interface(**kwargs)


PARTS: dict[str, type[nn.Module]] = {**COMMON_PARTS, "Qwen2Attention": Attention}
