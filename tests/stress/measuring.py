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


class _Watch:
    """Hooks on a model, and the largest magnitude that each kind of tensor had."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        self.found = dict.fromkeys(("scores", "residual", "block", "act_up", "down", "partial"), 0.0)
        self.head_dim = head_dim_of(model)
        self.query: Tensor | None = None
        self.hooks = [model.model.norm.register_forward_pre_hook(self.before_norm)]
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                self.hooks.append(norm.register_forward_pre_hook(self.before_norm))
            self.hooks.append(layer.self_attn.q_proj.register_forward_hook(self.after_query))
            self.hooks.append(layer.self_attn.k_proj.register_forward_hook(self.after_key))
            self.hooks.append(layer.self_attn.o_proj.register_forward_hook(self.after_block))
            self.hooks.append(layer.mlp.down_proj.register_forward_hook(self.after_down))

    def note(self, key: str, value: Tensor | float) -> None:
        size = float(value.abs().max()) if isinstance(value, Tensor) else value
        self.found[key] = max(self.found[key], size) if math.isfinite(size) else math.inf

    def heads(self, output: Tensor) -> Tensor:
        """The heads of a projection, rotated."""
        batch, length, _ = output.shape
        return rotate(output.view(batch, length, -1, self.head_dim).transpose(1, 2).float(), ROPE_THETA)

    def before_norm(self, module: nn.Module, args: Any) -> None:
        self.note("residual", args[0])

    def after_query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.query = self.heads(output)

    def after_key(self, module: nn.Module, args: Any, output: Tensor) -> None:
        query, self.query = self.query, None
        assert query is not None
        key = self.heads(output)
        self.note("scores", query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2))

    def after_block(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.note("block", output)

    def after_down(self, module: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        activation = args[0].float().flatten(0, -2)
        self.note("act_up", activation)
        self.note("down", output)
        self.note("block", output)
        largest = activation[activation.abs().amax(-1).argmax()]
        self.note("partial", _partial_sum_peak(module.weight.float(), largest))


@torch.no_grad()
def peaks(model: Qwen2ForCausalLM, input_ids: Tensor) -> dict[str, float]:
    """Largest magnitudes of one forward pass over (batch, length) token ids without padding.

    Keys: scores (q·k unscaled), residual, block (what an attention or MLP block adds), act_up, down (output of
    down_proj) and partial (its partial sums, for the token with the largest act·up).
    """
    watch = _Watch(model)
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in watch.hooks:
            hook.remove()
    return watch.found
