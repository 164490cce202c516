"""torch.compile: a fixed model is one graph wherever stock is, with and without a cache."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch._dynamo.exc import Unsupported
from transformers import DynamicCache

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import cache_origin
from tests.conformance.models import (
    ATTENTIONS,
    CACHE,
    COMPILES_ALL,
    PROMPT,
    RELEASE,
    SDPA_MASKS_RAISE,
    TORCH,
    kl,
    static_cache,
)
from tests.stress import TINY, build

FIRST = 8  # tokens of the prompt that are in the cache before a single one follows

#: Stock's static caches up to 4.44 ask a tensor for a decision, which no compiler traces.
HAS_STATIC = Version("4.45") <= RELEASE
#: Stock's sdpa of 4.39 refuses to be traced without a mask.
COMPILING = "eager" if RELEASE.release[:2] == (4, 39) else "sdpa"
#: Attention and cache: all pairs once a torch version, and on every release one, since a compilation takes seconds.
CASES = (
    [(attention, kind) for attention in ATTENTIONS for kind in ("no cache", "dynamic", "static")]
    if COMPILES_ALL
    else [(COMPILING, "dynamic")]
)
CASES = [
    (attention, kind)
    for attention, kind in CASES
    if kind != "static" or (HAS_STATIC and not (attention == "sdpa" and SDPA_MASKS_RAISE))
]

#: A compiler takes addcmul apart, and sdpa another path: a fifth of what float16 itself costs here.
ROUNDINGS = 5e-6


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts and ends as a process that has compiled nothing; what follows may not know of it either."""
    monkeypatch.setattr(cache_origin, "TRACED", [])
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(attention: str, kinds: tuple[str, ...] = ("scores", "residual", "keys_fast")) -> Any:
    """A stock fp32 model, as small as one with all kinds of layers can be."""
    return build(replace(TINY, layers=2), kinds, attn_implementation=attention)


def at(start: int, end: int) -> dict[str, Any]:
    """Where tokens go in a cache. Releases up to 5.3 would ask the cache, which a compiler cannot trace if static."""
    return {"cache_position": torch.arange(start, end)} if Version("4.45") <= RELEASE < Version("5.4") else {}


@torch.no_grad()
def steps(run: Any, model: Any, kind: str) -> list[torch.Tensor]:
    """Logits of a prompt and, with a cache, of the token after it; `run` is the model or what was compiled of it."""
    if kind == "no cache":
        return [run(input_ids=PROMPT, use_cache=False).logits.float()]
    cache = DynamicCache() if kind == "dynamic" else static_cache(model)
    inputs = {CACHE: cache, "use_cache": True}
    prompt = run(input_ids=PROMPT[:, :FIRST], **inputs, **at(0, FIRST))
    token = run(input_ids=PROMPT[:, FIRST : FIRST + 1], **inputs, **at(FIRST, FIRST + 1))
    return [prompt.logits.float(), token.logits.float()]


def compiled(model: Any, kind: str, backend: str) -> list[torch.Tensor]:
    """The same by a compiler. Raises Unsupported where it does not get one graph a step."""
    return steps(torch.compile(model, backend=backend, fullgraph=True), model, kind)


@pytest.mark.parametrize(("attention", "kind"), CASES)
def test_a_fixed_model_is_one_graph_wherever_stock_is(attention: str, kind: str) -> None:
    """On torch 2.4 to 2.12 a question about autocast or about a cache's class broke the graph, and no test compiled."""
    fixed = qwen2_fp16_fix.fix(model(attention).half())
    expected = steps(fixed, fixed, kind)
    try:
        found = compiled(fixed, kind, "eager")
    except Unsupported:
        torch._dynamo.reset()
        with pytest.raises(Unsupported):
            compiled(model(attention), kind, "eager")
        assert Version("2.8") > TORCH, "stock compiled on this torch"  # or nothing would be compared at all
        return
    assert all(kl(one, other) < ROUNDINGS for one, other in zip(expected, found, strict=True))


if COMPILES_ALL:

    def test_inductor_keeps_the_lower_parts() -> None:
        """It takes k.half().float() for k: the lower parts of split keys were 0 in its code, and in no other backend's.

        A failure to find a C++ compiler means that g++ is missing.
        """
        fixed = qwen2_fp16_fix.fix(model("sdpa", ("keys_fast",)).half())
        oracle, expected = (steps(each, each, "dynamic") for each in (model("sdpa", ("keys_fast",)), fixed))
        try:
            found = compiled(fixed, "dynamic", "inductor")
        except Unsupported:
            assert Version("2.8") > TORCH
            return
        assert all(kl(one, other) < ROUNDINGS for one, other in zip(expected, found, strict=True))
        assert all(kl(one, other) < ROUNDINGS for one, other in zip(oracle, found, strict=True))
