"""torch.compile and torch.export: whole graphs, compiled once."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

import qwen2_fp16_fix
from benchmarks.workloads import CACHE
from qwen2_fp16_fix.patches import autocast
from tests.helpers import Logits, kl_to
from tests.stress import KINDS, TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=1, length=24)
ROUNDINGS = 5e-6  # a compiler takes addcmul apart, and sdpa another path: a fifth of what float16 itself costs here


def fixed(attention: str) -> Any:
    """With every way of keeping in range at work: exponents, fp32 residual, centred keys. A layer compiles for long."""
    model = qwen2_fp16_fix.fix(build(replace(TINY, layers=2), KINDS, attn_implementation=attention).half())
    assert max(layer.mlp.exponent for layer in model.model.layers) > 0
    assert all(layer.self_attn.centre is not None for layer in model.model.layers)
    return model


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


@pytest.fixture
def older_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler before 2.13: it cannot trace the question whether autocast knows a device."""
    untraceable = torch._dynamo.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)


@pytest.mark.usefixtures("older_compiler")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("phase", ["prefill", "static decode"])
def test_an_older_compiler_makes_one_graph(attention: str, phase: str) -> None:
    """Stock compiles whole on torch 2.8 to 2.11, and so must the fixed model."""
    model: Any = fixed(attention)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        if phase == "prefill":
            inputs: list[dict[str, Any]] = [{"input_ids": PROMPT, "use_cache": False}] * 2
        else:
            caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
            for cache in caches:
                model(input_ids=PROMPT[:, :8], **{CACHE: cache})
            inputs = [{"input_ids": PROMPT[:, 8:9], CACHE: cache} for cache in caches]
        got, expected = compiled(**inputs[0]).logits, model(**inputs[1]).logits
    assert torch.isfinite(got).all()
    assert kl_to(expected, got) < ROUNDINGS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_compiled_graph_still_sees_autocast(dtype: torch.dtype) -> None:
    """Whether it is on, for the device as it is; and a model without weights is asked about a device that computes."""

    def answers(x: torch.Tensor) -> tuple[bool, bool]:
        return autocast.runs_in_float16(x), autocast.is_full_precision(x)

    compiled: Any = torch.compile(answers, backend="eager", fullgraph=True)
    for device in ("cpu", "meta"):
        x = torch.empty(2, dtype=dtype, device=device)
        assert compiled(x) == answers(x) == (dtype == torch.float16, dtype == torch.float32)
        with torch.autocast("cpu", torch.float16):
            assert compiled(x) == answers(x) == (True, False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_exported_program_is_the_fixed_model(attention: str) -> None:
    """The exported program is the fixed model, not stock's forward found some other way: those logits are NaN."""
    model = Logits(fixed(attention))
    with torch.no_grad():
        program = torch.export.export(model, (PROMPT,))
        got = program.module()(PROMPT)
        assert torch.isfinite(got).all()
        assert kl_to(model(PROMPT), got) < ROUNDINGS


@pytest.mark.parametrize("kinds", [(), ("keys_fast",)], ids="+".join)
def test_layers_compiled_one_by_one_share_their_graphs(kinds: tuple[str, ...]) -> None:
    """As in training, without a cache: a number of each layer's own in a guard comes to torch's limit of eight."""
    model = qwen2_fp16_fix.fix(build(replace(TINY, layers=10), kinds, attn_implementation="sdpa").half())
    counter = CompileCounter()
    with torch.no_grad():
        model(input_ids=PROMPT, use_cache=False)
        for layer in model.model.layers:
            layer.compile(backend=counter)
        model(input_ids=PROMPT, use_cache=False)
    assert counter.frame_count <= 3  # for exponents of 0 and above, and for pairs in two parts
