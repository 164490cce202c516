"""Shapes, kinds, prompts and models. What a kind is: see the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

KINDS: tuple[str, ...] = ("scores", "keys", "keys_fast", "massive", "residual", "swiglu", "moe57")
MARKED = ("massive", "residual", "swiglu", "moe57")  # kinds whose spike appears at marker tokens
MARKER_PERIOD = 32  # token t carries the marker of MARKED[m] where t % MARKER_PERIOD == 1 + m
MARKER = 16.0  # length of a marker, in lengths of an ordinary embedding
GAIN = 2.0**-4  # norm gain of a channel that holds a spike: small, as in real models
ROPE_THETA = 1e6


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2 model; head_dim is hidden // heads."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


TINY = Shape(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=256, vocab=128)
QWEN2_0_5B = Shape(hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, vocab=151936)
QWEN2_1_5B = Shape(hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, vocab=151936)
QWEN2_7B = Shape(hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18944, vocab=152064)
# seven query heads a key head and head_dim 128, as in 7B
QWEN2_7B_SLIM = Shape(hidden=896, layers=28, heads=7, kv_heads=1, intermediate=2432, vocab=1024)
SHAPES = {"tiny": TINY, "0.5b": QWEN2_0_5B, "1.5b": QWEN2_1_5B, "7b": QWEN2_7B, "7b-slim": QWEN2_7B_SLIM}


def config(shape: Shape, **overrides: Any) -> Qwen2Config:
    """A Qwen2Config of this shape. transformers 5 takes `rope_theta` too, as `rope_parameters`."""
    settings: dict[str, Any] = dict(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        rope_theta=ROPE_THETA,
        tie_word_embeddings=False,
    )
    return Qwen2Config(**{**settings, **overrides})


def build(shape: Shape, kinds: Sequence[str], seed: int = 0, **config_overrides: Any) -> Qwen2ForCausalLM:
    """A stock float32 model in eval mode that has every magnitude in `kinds`.

    `attn_implementation` is accepted among the overrides.
    Raises ValueError for an unknown kind or fewer than two layers.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"unknown kinds {unknown}; choose from {list(KINDS)}")
    attention = config_overrides.pop("attn_implementation", None)
    settings = config(shape, **config_overrides)
    if settings.num_hidden_layers < 2:
        raise ValueError("a stress model needs at least two layers")
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = Qwen2ForCausalLM._from_config(settings, **chosen).float().eval()
    with torch.no_grad():
        _fill(model, torch.Generator().manual_seed(seed))
        for kind in ("scores", "keys", "keys_fast"):
            if kind in kinds:
                _spike_attention(model, kind)
        spikes = _Spikes(model)
        for kind in MARKED:
            if kind in kinds:
                spikes.add(kind)
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def random_prompt(shape: Shape, batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) int64 token ids that start with the marker tokens of the kinds in MARKED, in that order."""
    ids = torch.randint(shape.vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    markers = torch.arange(1, 1 + len(MARKED))[:length]
    ids[:, : len(markers)] = markers
    return ids


def _fill(model: Qwen2ForCausalLM, generator: torch.Generator) -> None:
    """Unit embeddings, matrices scaled by fan-in, residual writers small enough to keep the stream near 1."""
    depth = math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        parameter.normal_(generator=generator)
        if parameter.ndim == 1 and "norm" in kind:
            parameter.mul_(0.1).add_(1)
        elif kind in ("q_proj", "v_proj") and parameter.ndim == 1:
            parameter.mul_(0.3)
        elif kind in ("o_proj", "down_proj"):
            parameter.mul_(2 / (depth * math.sqrt(parameter.shape[1])))
        elif kind == "lm_head":
            parameter.mul_(1.5 / math.sqrt(parameter.shape[1]))
        elif parameter.ndim == 2 and kind != "embed_tokens":
            parameter.mul_(1 / math.sqrt(parameter.shape[1]))
        # k_proj.bias stays at 1 per number: a norm of 22 at the 512 numbers Qwen2-7B has


def head_dim_of(model: Qwen2ForCausalLM) -> int:
    """Width of one attention head."""
    return int(model.config.hidden_size // model.config.num_attention_heads)


def _spike_attention(model: Qwen2ForCausalLM, kind: str) -> None:
    """Biases on q_proj and k_proj of the first and the last layer.

    scores: one number a head of 302 (first) and 460 (last), so 605 and 921 over the four key heads of 7B, and a
        query bias that lifts raw scores to 85,000. The pair is the slowest and carries nothing else, so float16
        holds the spiked keys exactly: only the range is lost.
    keys: 300 and -160 in the two dims of the slowest pair but one, whose weights carry information that float16
        rounds away: only accuracy is lost.
    keys_fast: the same in two faster pairs, those of frequency base^-0.75 and base^-0.625.
    """
    head_dim, half = head_dim_of(model), head_dim_of(model) // 2
    layers = model.model.layers
    for index, strength in ((0, 302.0), (len(layers) - 1, 460.0)):
        attention = layers[index].self_attn
        key, query = attention.k_proj.bias.view(-1, head_dim), attention.q_proj.bias.view(-1, head_dim)
        if kind == "scores":
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight.view(-1, head_dim, projection.in_features)[:, half - 1 :: half] = 0
                projection.bias.view(-1, head_dim)[:, half - 1 :: half] = 0
            key[:, half - 1] = strength
            query[:, half - 1] = 85000 / strength
        else:
            pairs = [half - 2] if kind == "keys" else [int(0.75 * half), int(0.625 * half)]
            for pair in pairs:
                key[:, pair], key[:, pair + half] = 300, -160
                query[:, pair] = 16


class _Spikes:
    """Marker tokens, the neurons that read them and what these write; hands out channels and neurons."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        self.model = model
        self.channels = iter(range(model.config.hidden_size))
        self.neurons = iter(range(model.config.intermediate_size))

    def add(self, kind: str) -> None:
        """Build one of MARKED. At least one layer follows the spike, so that later tokens see it."""
        last = len(self.model.model.layers) - 1
        early = min(3, max(0, last - 1))
        marker = self._channel(gain=1.0)
        tokens = slice(1 + MARKED.index(kind), None, MARKER_PERIOD)
        self.model.model.embed_tokens.weight[tokens, marker] = MARKER * self._root()
        if kind == "massive":
            self._write(early, marker, {self._channel(): 11885.0, self._channel(): 7530.0})
        elif kind == "moe57":
            self._write(early, marker, {self._channel(): 50000.0})
        elif kind == "residual":
            first, second = self._channel(), self._channel()
            start = min(3, max(0, last - 2))
            self._write(start, marker, {first: 50000.0, second: 45000.0})
            share = 50 / math.hypot(50, 45)  # of the token's length that `first` has from now on
            self._write(max(start + 1, last - 1), first, {first: 34000.0, second: 30000.0}, share)
        elif kind == "swiglu":
            totals = {self._channel(): 37000.0, self._channel(): 56000.0, self._channel(): 70000.0}
            rise = dict.fromkeys(totals, 120000.0)  # the partial sum half way
            fall = {channel: total - rise[channel] for channel, total in totals.items()}
            for part in (rise, fall):
                self._write(max(0, last - 1), marker, part, activation=4300.0, copies=4)

    def _root(self) -> float:
        return math.sqrt(self.model.config.hidden_size)

    def _channel(self, gain: float = GAIN) -> int:
        """The next residual channel, written by no weight so far and read through a norm gain of `gain`."""
        channel = next(self.channels)
        self.model.model.embed_tokens.weight[:, channel] = 0
        self.model.model.norm.weight[channel] = gain
        for layer in self.model.model.layers:
            layer.self_attn.o_proj.weight[channel] = 0
            layer.mlp.down_proj.weight[channel] = 0
            layer.input_layernorm.weight[channel] = gain
            layer.post_attention_layernorm.weight[channel] = gain
        return channel

    def _write(
        self,
        layer: int,
        source: int,
        targets: dict[int, float],
        share: float = 1.0,
        activation: float = 64.0,
        copies: int = 1,
    ) -> None:
        """Neurons that add `targets` {channel: value} where channel `source` holds `share` of a token's length.

        Each of the `copies` neurons then has act(gate)·up near `activation`.
        """
        block = self.model.model.layers[layer]
        gain = float(block.post_attention_layernorm.weight[source])
        read = math.sqrt(activation) / (self._root() * share * gain)
        for _ in range(copies):
            neuron = next(self.neurons)
            for projection in (block.mlp.gate_proj, block.mlp.up_proj):
                projection.weight[neuron] = 0
                projection.weight[neuron, source] = read
            block.mlp.down_proj.weight[:, neuron] = 0
            for channel, value in targets.items():
                block.mlp.down_proj.weight[channel, neuron] = value / (copies * activation)
