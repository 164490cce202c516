"""torch's fused attention for query heads that share key heads, given so that a fused kernel takes it everywhere.

transformers from 4.54 on lets torch share the heads (`enable_gqa`) where there is no mask. Of torch's fused kernels
for CUDA only flash does that, and it begins at compute capability 8.0. On older GPUs torch then writes the scores
out. Before 4.54, and with a mask, transformers repeats the keys of the whole cache in each step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from .numerics import device_of

#: Where transformers defines its own function, from 4.48 on.
HOME = "transformers.integrations.sdpa_attention"
#: Further arguments of transformers' function, in some release. A call with one of them is left to that function.
OTHER_ARGUMENTS = ("cache", "head_mask", "output_attentions", "position_bias", "softcap")


def stock_sdpa() -> Any:
    """The function for "sdpa" in transformers' table; None before 4.48, and where another tool has replaced it.

    A wrapper takes over the name and the module of what it wraps, but not its globals.
    """
    found = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {}).get("sdpa")
    return found if getattr(found, "__globals__", {}).get("__name__") == HOME else None


#: transformers' own function, whose place `sdpa_attention` takes under any name.
STOCK_SDPA = stock_sdpa()


class Ungrouped:
    """Stands for an attention module whose keys are repeated: transformers' function finds nothing to repeat in it."""

    def __init__(self, attention: nn.Module) -> None:
        """attention: the module."""
        self.is_causal = getattr(attention, "is_causal", True)


def sdpa_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, with a single query or on an older GPU given so that a fused kernel takes it.

    query (B, H, Q, D), key (B, G, K, D) and value (B, G, K, E). Returns the output (B, Q, H, E) and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    plain = all(kwargs.get(name) is None or kwargs[name] is False for name in OTHER_ARGUMENTS)
    if plain and query.shape[2] == 1:
        dropout, scaling = kwargs.get("dropout", 0.0), kwargs.get("scaling")
        return attend_with_one_query(query, key, value, attention_mask, scaling, dropout), None
    if plain and groups > 1 and not shares_key_heads(query):
        key, value = repeated(key, groups), repeated(value, groups)
        module = Ungrouped(module)  # type: ignore[assignment]
    output: tuple[Tensor, None] = STOCK_SDPA(module, query, key, value, attention_mask, **kwargs)
    return output


def attend_with_one_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    """Attention of one query over all keys that the mask allows; nothing is repeated and no heads are shared.

    The query heads of a key head go to torch as that many queries of one head, which any kernel takes.
    query (B, H, 1, D), key (B, G, K, D), value (B, G, K, E), mask (B or 1, H or 1, 1, K). Returns (B, 1, H, E).
    """
    batch, heads, _, width = query.shape
    key_heads = key.shape[1]
    if mask is not None and mask.dim() > 2 and mask.shape[-3] > 1:
        mask = mask.reshape(*mask.shape[:-3], key_heads, -1, mask.shape[-1])
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key_heads, -1, width), key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, 1, heads, -1)


def shares_key_heads(tensor: Tensor) -> bool:
    """Whether torch may have a fused kernel on the tensor's device for query heads that share key heads."""
    return device_of(tensor) != "cuda" or has_flash(tensor.device.index)


def has_flash(index: int | None) -> bool:
    """Whether torch's flash kernel runs on the NVIDIA GPU of that index. AMD's GPUs are not asked."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(index) >= (8, 0)


#: Compilers take the answer as a constant: a graph is compiled for one device.
has_flash._dynamo_marked_constant = True  # type: ignore[attr-defined]


def repeated(heads: Tensor, times: int) -> Tensor:
    """heads (B, G, K, D), each one `times` times in a row: (B, G·times, K, D)."""
    return heads.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)
