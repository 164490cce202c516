"""The models of a proof: small stress models, whose fp32 answer a CPU knows, and ordinary ones of released widths."""

import copy
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

import qwen2_fp16_fix
from tests import stress

from ..models import VOCABULARY, WIDTHS, sharing_weights

#: Heads of 64 channels: every kernel takes them.
SHAPE = replace(stress.TINY, hidden=256, heads=4, kv_heads=2, intermediate=512)


def named(kinds: tuple[str, ...]) -> str:
    """What the tables call a stress model."""
    return "plain" if not kinds else "all" if kinds == stress.KINDS else "+".join(kinds)


@functools.lru_cache(maxsize=16)
def stressed(kinds: tuple[str, ...], **settings: Any) -> Any:
    """A stock fp32 model on the CPU. Nobody may change it."""
    return stress.build(SHAPE, kinds, attn_implementation="eager", **settings)


def pair(base: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """The model in that dtype on that device, stock and fixed."""
    stock = copy.deepcopy(base).to(dtype).to(device)
    return stock, qwen2_fp16_fix.fix(copy.deepcopy(stock))


@torch.no_grad()
def oracle_of(base: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of the fp32 model, on the CPU."""
    logits: Tensor = base(input_ids=ids, **inputs).logits.float()
    return logits


@torch.no_grad()
def ordinary(width: str, layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A stock model of a released width with random, well-behaved weights that are made on the device itself.

    On a CPU 7B would take a minute. Layers are few and the vocabulary is cut, as in benchmarks/models.py.
    """
    settings = stress.config(replace(WIDTHS[width], layers=layers, vocab=VOCABULARY), max_position_embeddings=32768)
    settings._attn_implementation = "eager"
    with torch.device("meta"):
        empty = Qwen2ForCausalLM(settings).to(dtype)
    model = empty.to_empty(device=device).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)  # its tables are no weights
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(generator=generator).mul_(0.1).add_(1.0 if "norm" in name else 0.0)
        else:
            parameter.normal_(generator=generator).mul_(spread(name, parameter.shape[1], layers))
    return model


def spread(name: str, inputs: int, layers: int) -> float:
    """The standard deviation of a matrix that keeps the residual stream near 1, as that of tests/stress."""
    if "embed_tokens" in name:
        return 1.0
    writes = "o_proj" in name or "down_proj" in name
    return float(2 / (2 * layers * inputs) ** 0.5 if writes else inputs**-0.5)


def twins(weights: Any, attention: str) -> tuple[Any, Any]:
    """Stock and fixed models of the very same weights."""
    stock, fixed = sharing_weights(weights), sharing_weights(weights)
    for model in (stock, fixed):
        model.config._attn_implementation = attention
    return stock, qwen2_fp16_fix.fix(fixed)
