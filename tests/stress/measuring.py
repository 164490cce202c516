"""The magnitudes of a stress model, measured by hooks of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from tests.stress.models import ROPE_THETA, head_dim_of


def rotate(states: Tensor, base: float) -> Tensor:
    """Rotate (batch, heads, length, head_dim) states at positions 0, 1, ...; dim i pairs with i + head_dim / 2."""
    half = states.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(states.shape[-2], dtype=torch.float64), frequency)
    cos, sin = angle.cos().to(states.dtype), angle.sin().to(states.dtype)
    first, second = states[..., :half], states[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _partial_sum_peak(weight: Tensor, vector: Tensor) -> float:
    """Largest |partial sum|, in index order, of weight (out, in) times vector (in,)."""
    return max(float((rows * vector).cumsum(dim=-1).abs().max()) for rows in torch.split(weight, 512))


@torch.no_grad()
def peaks(model: Qwen2ForCausalLM, input_ids: Tensor) -> dict[str, float]:
    """Largest magnitudes of one forward pass over (batch, length) token ids without padding.

    Keys: scores (q·k unscaled), residual, block (what an attention or MLP block adds), act_up, down (output of
    down_proj) and partial (its partial sums, for the token with the largest act·up).
    """
    found = dict.fromkeys(("scores", "residual", "block", "act_up", "down", "partial"), 0.0)
    head_dim = head_dim_of(model)
    pending: dict[str, Tensor] = {}

    def note(key: str, value: Tensor | float) -> None:
        size = float(value.abs().max()) if isinstance(value, Tensor) else value
        found[key] = max(found[key], size) if math.isfinite(size) else math.inf

    def heads(output: Tensor) -> Tensor:
        batch, length, _ = output.shape
        return rotate(output.view(batch, length, -1, head_dim).transpose(1, 2).float(), ROPE_THETA)

    def on_query(module: nn.Module, args: Any, output: Tensor) -> None:
        pending["query"] = heads(output)

    def on_key(module: nn.Module, args: Any, output: Tensor) -> None:
        query = pending.pop("query")
        key = heads(output)
        note("scores", query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2))

    def on_block(module: nn.Module, args: Any, output: Tensor) -> None:
        note("block", output)

    def on_down(module: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        activation = args[0].float().flatten(0, -2)
        note("act_up", activation)
        note("down", output)
        note("block", output)
        largest = activation[activation.abs().amax(-1).argmax()]
        note("partial", _partial_sum_peak(module.weight.float(), largest))

    hooks = [model.model.norm.register_forward_pre_hook(lambda module, args: note("residual", args[0]))]
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            hooks.append(norm.register_forward_pre_hook(lambda module, args: note("residual", args[0])))
        hooks.append(layer.self_attn.q_proj.register_forward_hook(on_query))
        hooks.append(layer.self_attn.k_proj.register_forward_hook(on_key))
        hooks.append(layer.self_attn.o_proj.register_forward_hook(on_block))
        hooks.append(layer.mlp.down_proj.register_forward_hook(on_down))
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
