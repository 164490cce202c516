"""What a model is asked to do: read a prompt, or write one token after a context."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from .models import prompt

Step = Callable[[], Any]
#: What a model calls its cache.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def prefill(model: Any, tokens: int, batch: int) -> Step:
    """Reads `tokens` tokens into a new cache."""
    ids = prompt(batch, tokens, model.device)
    return lambda: model(input_ids=ids, use_cache=True)


def decode(model: Any, context: int, batch: int) -> Step:
    """Writes one token after `context` tokens, then takes it off the cache again: every step is the same."""
    cache = filled(DynamicCache(), model, context, batch)
    token = prompt(batch, 1, model.device)

    def step() -> None:
        model(input_ids=token, use_cache=True, **{CACHE: cache})
        cache.crop(-1)

    return step


def decode_statically(model: Any, context: int, batch: int, room: int = 256) -> Step:
    """Writes one token after another into a static cache, `room` of them, then starts again with a new one.

    Attention reads the whole static cache, so every step is the same. This is what compiled code wants.
    """
    token = prompt(batch, 1, model.device)
    caches: list[Any] = []

    def step() -> None:
        if not caches or caches[0][1] == 0:
            empty = StaticCache(config=model.config, max_cache_len=context + room)
            caches[:] = [[filled(empty, plain(model), context, batch), room]]
        caches[0][1] -= 1
        model(input_ids=token, use_cache=True, **{CACHE: caches[0][0]})

    return step


def plain(model: Any) -> Any:
    """The model that torch.compile has wrapped."""
    return getattr(model, "_orig_mod", model)


@torch.no_grad()
def filled(cache: Any, model: Any, context: int, batch: int) -> Any:
    """The cache with `context` tokens: the first read by the model, the others random.

    Time does not depend on what keys say, and reading a long prompt would take longer than the measurement.
    """
    model(input_ids=prompt(batch, 1, model.device), use_cache=True, **{CACHE: cache})
    config = model.config
    generator = torch.Generator(model.device).manual_seed(0)
    for layer in range(config.num_hidden_layers) if context > 1 else ():
        width = cache.layers[layer].keys.shape[-1]  # with pairs in two parts it is more than head_dim
        shape = (batch, config.num_key_value_heads, context - 1, width)
        key, value = (torch.randn(shape, generator=generator, device=model.device).to(model.dtype) for _ in range(2))
        cache.update(key, value, layer)
    return cache
