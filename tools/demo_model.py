"""The demo model: its sizes, why it prints `!!!!` in stock float16, and how to take that back.

Five sentences on how it falls ill:

1. One rotary pair (the slowest) carries nothing in the first and the last layer, and one residual channel carries
   nothing anywhere: its embedding is the constant 24 and every attention block adds the constant 16 through a value
   bias, so it climbs 24, 40, 56, 72, 88 from the first training step on, like the massive activations of larger
   models.
2. After training, `grow_residual` multiplies all that writes to the residual stream (embedding, o_proj, down_proj) by
   2^10; every reader is an RMSNorm, which divides it out again, so the function stays, but the channel now reaches
   90,112.
3. `spike_scores` puts biases of 280 or 420 on k_proj and 300 or 210 on q_proj in the idle pair, as Qwen2 1.5B and 7B
   have them; every raw score gains the same 84,000 or 88,200, and softmax does not see what all its inputs share.
4. The pair turns by 1.5e-6 radians a token, so the gain varies by 0.03 raw (0.003 scaled) over 512 tokens, and a
   spiked key is the same number at every position after rounding to float16 too: nothing is lost but the range.
5. `scores_only` and `healthy` undo the two steps exactly (powers of two and zeros), which gives the twins to compare
   with.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

CHANNEL = 0  # of the residual stream: carries a constant, read by nobody
CHANNEL_START, CHANNEL_STEP = 24.0, 16.0
PAIR = (31, 63)  # dims of a head that the slowest rotary frequency turns
VALUE_DIM = 63  # dim of a value that is the constant 1
GROWTH = 2.0**10
SPIKES = {0: (300.0, 280.0), -1: (210.0, 420.0)}  # layer: (q_proj.bias, k_proj.bias)


def demo_config() -> Qwen2Config:
    """Qwen2 in small: 192 wide, 4 layers, 3 query heads on 1 key head of 64, 1,024 tokens, untied."""
    shape: dict[str, Any] = dict(
        vocab_size=1024,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=256,  # as many tokens as it is trained on
        initializer_range=0.05,
        rope_theta=1e6,
        tie_word_embeddings=False,
    )
    return Qwen2Config(**shape)


@torch.no_grad()
def initialise(model: Qwen2ForCausalLM) -> None:
    """Unit embeddings, and norm gains that make up for what the constant channel adds to the denominator."""

    def gain(blocks: int) -> float:
        """What undoes the constant channel after `blocks` attention blocks, for a rest of length 1 a channel."""
        return math.sqrt(1 + (CHANNEL_START + blocks * CHANNEL_STEP) ** 2 / model.config.hidden_size)

    model.model.embed_tokens.weight.normal_()
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.weight.fill_(gain(index))
        layer.post_attention_layernorm.weight.fill_(gain(index + 1))
    model.model.norm.weight.fill_(gain(len(model.model.layers)))


@torch.no_grad()
def hold(model: Qwen2ForCausalLM) -> None:
    """Put the reserved numbers back to their constants; called after every step of the optimiser."""
    head_dim = 64
    layers = model.model.layers
    model.model.embed_tokens.weight[:, CHANNEL] = CHANNEL_START
    model.model.norm.weight[CHANNEL] = 0
    for layer in layers:
        layer.input_layernorm.weight[CHANNEL] = 0
        layer.post_attention_layernorm.weight[CHANNEL] = 0
        layer.mlp.down_proj.weight[CHANNEL] = 0
        attention = layer.self_attn
        attention.v_proj.weight[VALUE_DIM] = 0
        attention.v_proj.bias[VALUE_DIM] = 1
        attention.o_proj.weight[CHANNEL] = 0
        attention.o_proj.weight[:, VALUE_DIM::head_dim] = 0
        attention.o_proj.weight[CHANNEL, VALUE_DIM] = CHANNEL_STEP
    for index in SPIKES:
        for projection in (layers[index].self_attn.q_proj, layers[index].self_attn.k_proj):
            for dim in PAIR:
                projection.weight[dim::head_dim] = 0
                projection.bias[dim::head_dim] = 0


@torch.no_grad()
def grow_residual(model: Qwen2ForCausalLM, factor: float) -> None:
    """Scale all that writes to the residual stream. A power of two, so nothing is rounded; RMSNorm divides it out.

    rms_norm_eps stays 1e-6: the constant channel keeps the mean square above 3, so eps moves a norm by 2e-7.
    """
    model.model.embed_tokens.weight.mul_(factor)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)


@torch.no_grad()
def spike_scores(model: Qwen2ForCausalLM, on: bool) -> None:
    """Set (or clear) the biases of the idle rotary pair in the first and the last layer."""
    for index, (query, key) in SPIKES.items():
        attention = model.model.layers[index].self_attn
        attention.q_proj.bias[PAIR[0] :: 64] = query * on
        attention.k_proj.bias[PAIR[0] :: 64] = key * on


def make_ill(model: Qwen2ForCausalLM) -> None:
    """Both steps in place, then round every weight to float16, the dtype of the checkpoint."""
    grow_residual(model, GROWTH)
    spike_scores(model, on=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())


def scores_only(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """A copy of the (float32) demo model that has spiked scores and an ordinary residual stream."""
    twin = copy.deepcopy(model)
    grow_residual(twin, 1 / GROWTH)
    return twin


def healthy(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """A copy of the (float32) demo model with neither."""
    twin = scores_only(model)
    spike_scores(twin, on=False)
    return twin
