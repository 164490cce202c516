"""Models to compare: stock, fixed and rivals, with the very same weights in memory where their dtype is the same.

Widths are the released ones. Weights are random, layers few, and the vocabulary is cut to 1,024, so that what is
compared, the layers, is not hidden behind an output projection that stock and fixed share.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import qwen2_fp16_fix
from tests import stress

from . import rivals

VOCABULARY = 1024
WIDTHS = {"0.5b": stress.QWEN2_0_5B, "1.5b": stress.QWEN2_1_5B, "7b": stress.QWEN2_7B}
LAYERS = {"0.5b": 4, "1.5b": 2, "7b": 2}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

#: What a user can run, by name: the dtype and what is done to a stock model. `fp32 scores` is for eager attention.
VARIANTS: dict[str, tuple[str, Callable[[Any], Any] | None]] = {
    "stock fp16": ("fp16", None),
    "fixed fp16": ("fp16", qwen2_fp16_fix.fix),
    "stock bf16": ("bf16", None),
    "fixed bf16": ("bf16", qwen2_fp16_fix.fix),
    "stock fp32": ("fp32", None),
    "fp32 scores": ("fp16", rivals.use_fp32_scores),
    "clamped": ("fp16", rivals.clamp_layers),
}


class Workshop:
    """Builds models, and keeps the weights of the last width: cells of one width follow each other."""

    def __init__(self, device: torch.device) -> None:
        """device: where the models run."""
        self.device = device
        self.key: tuple[str, int] | None = None
        self.weights: dict[str, Any] = {}

    def model(self, variant: str, width: str, layers: int, attention: str) -> Any:
        """A model in eval mode; of one dtype, all share their weights."""
        if self.key != (width, layers):
            self.weights.clear()
            self.weights["fp16"] = build(width, layers, torch.float16).to(self.device)
            self.key = (width, layers)
        dtype, change = VARIANTS[variant]
        if dtype not in self.weights:
            self.weights[dtype] = copy.deepcopy(self.weights["fp16"]).to(DTYPES[dtype])
        twin = sharing_weights(self.weights[dtype])
        twin.config._attn_implementation = attention
        return twin if change is None else change(twin)


def build(width: str, layers: int, dtype: torch.dtype) -> Any:
    """A stock model with random, well-behaved weights."""
    shape = replace(WIDTHS[width], layers=max(2, layers), vocab=VOCABULARY)
    model = stress.build(shape, (), attn_implementation="eager", max_position_embeddings=32768).to(dtype)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model.eval()


def sharing_weights(model: nn.Module) -> Any:
    """A copy whose parameters are the model's own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@contextmanager
def first_layers(model: Any, count: int) -> Iterator[None]:
    """The model with its first layers alone, meanwhile."""
    layers, model.model.layers = model.model.layers, model.model.layers[:count]
    model.config.num_hidden_layers = count
    try:
        yield
    finally:
        model.model.layers, model.config.num_hidden_layers = layers, len(layers)


def prompt(batch: int, length: int, device: torch.device) -> Tensor:
    """(batch, length) random token ids."""
    shape = replace(stress.TINY, vocab=VOCABULARY)
    return stress.random_prompt(shape, batch, length).to(device)
