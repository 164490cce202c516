"""torch's fused attention, on every release: whole heads for a single query, and for every query of an older GPU.

No fused kernel of torch for NVIDIA's cards before capability 8.0 takes query heads that share key heads.
"""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from qwen2_fp16_fix.patches import sdpa
from tests.conformance.models import ALL, CACHE, CLOSE, PROMPT, fixed_half, kl, logits, padded, stress
from tests.stress import TINY


class FusedCalls(TorchFunctionMode):
    """What torch's fused attention is called with: heads and queries, heads and keys, whether it shares heads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], int, bool]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, key = args[:2]
            self.seen.append((tuple(query.shape[1:3]), key.shape[1], kwargs.get("enable_gqa", False)))
        return function(*args, **kwargs)


@pytest.mark.parametrize("with_pads", [False, True], ids=["whole", "padded"])
def test_a_token_is_decoded_without_shared_heads_or_repeated_keys(with_pads: bool) -> None:
    tokens, mask = padded() if with_pads else (PROMPT, torch.ones_like(PROMPT))
    model, oracle = fixed_half(ALL, "sdpa"), stress(ALL)
    with torch.no_grad():
        cache = model(input_ids=tokens[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        with FusedCalls() as calls:
            got = model(input_ids=tokens[:, -1:], attention_mask=mask, **{CACHE: cache}).logits
    groups = TINY.heads // TINY.kv_heads
    assert calls.seen == [((TINY.kv_heads, groups), TINY.kv_heads, False)] * TINY.layers
    assert kl(logits(oracle, tokens, attention_mask=mask)[:, -1:], got) < CLOSE


@pytest.mark.parametrize("with_pads", [False, True], ids=["whole", "padded"])
def test_a_prompt_repeats_its_keys_on_an_older_gpu(with_pads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "shares_key_heads", lambda tensor: False)
    tokens, mask = padded() if with_pads else (PROMPT, torch.ones_like(PROMPT))
    with FusedCalls() as calls:
        got = logits(fixed_half(ALL, "sdpa"), tokens, attention_mask=mask)
    assert calls.seen == [((TINY.heads, PROMPT.shape[1]), TINY.heads, False)] * TINY.layers
    kept = mask.bool()
    assert kl(logits(stress(ALL), tokens, attention_mask=mask)[kept], got[kept]) < CLOSE
