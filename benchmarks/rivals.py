"""What a user would pick instead of the fix, written from its description.

- fp32 scores: the remedy of transformers' pull request 33317. Eager attention repeats the keys as stock does, casts
  query and key to fp32, and multiplies, scales, masks and normalises there. The residual stream stays in float16.
- clamped: each layer's output is clamped into the float16 range, as some models' code does. NaN stays NaN.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

NAME = "fp32_scores"


def use_fp32_scores(model: Any) -> Any:
    """The model with eager attention whose scores are fp32. Needs transformers' attention interface (4.53)."""
    from transformers.masking_utils import eager_mask

    transformers.AttentionInterface.register(NAME, fp32_scores)
    transformers.AttentionMaskInterface.register(NAME, eager_mask)
    model.config._attn_implementation = NAME
    return model


def fp32_scores(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Output (B, Q, H, D) and weights (B, H, Q, K)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query.float() @ key.float().transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask.float()
    weights = scores.softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def clamp_layers(model: Any) -> Any:
    """The model with each layer's output clamped to what float16 holds."""
    limit = torch.finfo(torch.float16).max - 1000

    def clamp(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # releases before 4.55
            return (output[0].clamp(-limit, limit), *output[1:])
        return output.clamp(-limit, limit)

    for layer in model.model.layers:
        layer.register_forward_hook(clamp)
    return model
