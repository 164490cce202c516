"""Tokens per second of `generate` on the demo checkpoint, stock and fixed. Stock float16 computes NaN as fast."""

from collections.abc import Callable
from typing import Any

import torch

from qwen2_fp16_fix.demo import CHECKPOINT, load, quiet

from .models import DTYPES
from .pairs import compare

PROMPT_TOKENS, NEW_TOKENS = 32, 32


def measure(device: torch.device, budget: float) -> list[dict[str, Any]]:
    """A row for each attention and dtype, fit for JSON."""
    rows = []
    for attention in ("eager", "sdpa"):
        for dtype in ("fp16", "bf16"):
            models = (load(CHECKPOINT, fixed, DTYPES[dtype], attention).to(device) for fixed in (False, True))
            stock, fixed = (generating(model) for model in models)
            found = compare(stock, fixed, device, budget)
            row = {"attention": attention, "dtype": dtype, "stock": NEW_TOKENS / found.left}
            rows.append(row | {"fixed": NEW_TOKENS / found.right} | found.as_dict())
    return rows


def generating(model: Any) -> Callable[[], Any]:
    """Writes NEW_TOKENS greedily, whatever the model thinks of stopping."""
    ids = torch.arange(1, 1 + PROMPT_TOKENS, device=model.device).unsqueeze(0)
    options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}

    def run() -> None:
        with quiet():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    return run
