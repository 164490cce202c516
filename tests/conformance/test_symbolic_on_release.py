"""torch.fx through transformers' own tracer: where it traces a stock model, it traces a fixed one."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.fx.proxy import TraceError

import qwen2_fp16_fix
from tests.conformance.models import ATTENTIONS, CLOSE, PROMPT, RELEASE, fixed_half, kl, logits, padded, stress

#: Where the tracer traces a stock Qwen2: 4.40 puts it on the list, and from 4.48 on its attention loops over a shape.
TRACES = Version("4.40") <= RELEASE < Version("4.48")


def own_tracer() -> Callable[..., Any] | None:
    """transformers' `symbolic_trace`, which version 5 has no more."""
    if importlib.util.find_spec("transformers.utils.fx") is None:
        return None
    from transformers.utils import fx

    return fx.symbolic_trace


def traced(model: Any) -> Any:
    """The graph of a model, or None where there is none of this kind of model."""
    trace = own_tracer()
    if trace is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trace(model, ["input_ids", "attention_mask"])
    except (TraceError, ValueError, NotImplementedError):  # its steps, torch's own limit, or a model not on the list
        return None


@torch.no_grad()
def run(graph: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of a graph, whose output is a dict."""
    found: torch.Tensor = graph(input_ids=tokens, attention_mask=mask)["logits"]
    return found.float()


def test_where_stock_is_traced() -> None:
    assert (traced(stress()) is not None) == TRACES


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_graph_does_what_the_model_does(attention: str) -> None:
    """Traced on one prompt and run on others, before and after its plan is made."""
    model = qwen2_fp16_fix.fix(stress(("residual",), attention).half())
    for layer in model.model.layers:
        layer.__dict__["plan_due"] = True  # as a model that has been loaded and never run
    graph = traced(model)
    assert graph is not None or not TRACES
    if graph is None:
        return
    mask = torch.ones_like(PROMPT)
    for tokens, visible in ((PROMPT, mask), padded(), (PROMPT[:1, :7], mask[:1, :7])):
        found = run(graph, tokens, visible)
        assert torch.isfinite(found).all()
        assert torch.equal(found, logits(model, tokens, attention_mask=visible))
    assert kl(logits(stress(("residual",), attention)), run(graph, PROMPT, mask)) < CLOSE


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_graph_traced_in_fp32_is_fixed_in_float16(attention: str) -> None:
    """Its steps in fp32 are stock's; a graph of them would overflow once it is cast."""
    model = qwen2_fp16_fix.fix(stress(("scores", "residual"), attention))
    graph = traced(model)
    if graph is None:
        assert not TRACES
        return
    mask = torch.ones_like(PROMPT)
    oracle = logits(stress(("scores", "residual"), attention))
    assert torch.equal(run(graph, PROMPT, mask), logits(model, attention_mask=mask))
    found = run(graph.half(), PROMPT, mask)
    assert kl(oracle, found) < CLOSE
    assert kl(logits(fixed_half(("scores", "residual"), attention)), found) < CLOSE
