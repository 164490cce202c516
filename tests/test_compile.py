"""torch.compile and torch.export: whole graphs, compiled once."""

from typing import Any

import pytest
import torch
from conftest import kl_to
from stress import KINDS, TINY, build, random_prompt
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

import qwen2_fp16_fix
from benchmarks.workloads import CACHE

PROMPT = random_prompt(TINY, batch=1, length=24)
ROUNDINGS = 5e-6  # a compiler takes addcmul apart, and sdpa another path: a fifth of what float16 itself costs here


def fixed(attention: str) -> Any:
    """With every way of keeping in range at work: exponents, fp32 residual, centred keys."""
    return qwen2_fp16_fix.fix(build(TINY, KINDS, attn_implementation=attention).half())


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_decoding_into_a_static_cache_compiles_once(attention: str) -> None:
    """A graph break is a round trip to the host, a recompilation seconds: neither may come with a token."""
    model, counter = fixed(attention), CompileCounter()
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(input_ids=PROMPT[:, :8], **{CACHE: cache})
        for position in range(8, 14):
            token = PROMPT[:, position : position + 1]
            got = compiled(input_ids=token, **{CACHE: caches[0]}).logits
            assert kl_to(model(input_ids=token, **{CACHE: caches[1]}).logits, got) < ROUNDINGS
    assert torch.isfinite(got).all()
    assert counter.frame_count == 1


class Logits(torch.nn.Module):
    """Tokens in, logits out: what torch.export can write a signature for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_export(attention: str) -> None:
    """The exported program is the fixed model, not stock's forward found some other way: those logits are NaN."""
    model = Logits(fixed(attention))
    with torch.no_grad():
        program = torch.export.export(model, (PROMPT,))
        got = program.module()(PROMPT)
        assert torch.isfinite(got).all()
        assert kl_to(model(PROMPT), got) < ROUNDINGS
