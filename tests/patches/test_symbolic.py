"""torch.fx: each fixed part is one node of a graph, or is refused in one sentence."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwen2_fp16_fix
from tests.helpers import kl_to
from tests.patches.models import logits
from tests.stress import TINY, build, random_prompt

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.fx calls it

PROMPT = random_prompt(TINY, batch=2, length=24)
#: KL to fp32, nats. Float16's rounding comes to 1e-6 here, and what torch.fx could lose is far larger.
CLOSE = 2e-5


class Whole(nn.Module):
    """A Qwen2ForCausalLM without the code around its layers, which loops over shapes and so cannot be traced."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers, self.norm, self.head = model.model.layers, model.model.norm, model.lm_head

    def forward(self, embedded: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            embedded = layer(embedded, attention_mask=mask, position_embeddings=(cos, sin))
        found: Tensor = self.head(self.norm(embedded))
        return found


def fixed(*kinds: str) -> Any:
    return qwen2_fp16_fix.fix(build(TINY, kinds, attn_implementation="eager").half())


def oracle(*kinds: str) -> Tensor:
    return logits(build(TINY, kinds, attn_implementation="eager"), PROMPT)


def inputs(model: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What `Whole` takes: embeddings, tables and a causal mask, for the model in this dtype."""
    with torch.no_grad():
        embedded = model.model.embed_tokens(PROMPT).to(dtype)
        positions = torch.arange(PROMPT.shape[1])[None]
        cos, sin = model.model.rotary_emb(embedded, positions)
    causal = torch.ones(1, 1, PROMPT.shape[1], PROMPT.shape[1], dtype=torch.bool).tril()
    mask = torch.zeros(causal.shape, dtype=dtype).masked_fill(~causal, torch.finfo(dtype).min)
    return embedded, cos, sin, mask


def graph_of(model: Any) -> Any:
    return torch.fx.symbolic_trace(Whole(model))


@torch.no_grad()
def run(graph: Any, model: Any, dtype: torch.dtype = torch.float16) -> Tensor:
    found: Tensor = graph(*inputs(model, dtype))
    return found.float()


def test_a_graph_has_one_node_for_each_part() -> None:
    model = fixed()
    calls = [node.target for node in graph_of(model).graph.nodes if node.op == "call_module"]
    assert calls == [*(f"layers.{index}" for index in range(TINY.layers)), "norm", "head"]


@pytest.mark.parametrize("kinds", [(), ("residual",), ("keys",)], ids=str)
def test_a_graph_does_what_the_model_does(kinds: tuple[str, ...]) -> None:
    """Bit for bit, although the plan is made after the trace."""
    model = fixed(*kinds)
    for layer in model.model.layers:
        layer.__dict__["plan_due"] = True
    graph = graph_of(model)
    found = run(graph, model)
    assert torch.isfinite(found).all()
    assert torch.equal(found, logits(model, PROMPT))
    assert not any(layer.plan_due for layer in model.model.layers)
    assert kl_to(oracle(*kinds), found) < CLOSE


def test_a_graph_traced_in_fp32_is_fixed_once_it_is_cast() -> None:
    """In fp32 a part runs stock's steps. Stock's graph of them overflows in float16."""
    model = qwen2_fp16_fix.fix(build(TINY, ("scores", "residual"), attn_implementation="eager"))
    graph, exact = graph_of(model), oracle("scores", "residual")
    assert torch.equal(run(graph, model, torch.float32), exact)
    model.half()
    assert kl_to(exact, run(graph.half(), model)) < CLOSE


def test_the_rotary_embedding_is_a_node_too() -> None:
    class Turning(nn.Module):
        def __init__(self, rotary: nn.Module) -> None:
            super().__init__()
            self.rotary = rotary

        def forward(self, x: Tensor, positions: Tensor) -> Any:
            return self.rotary(x, positions)

    model, positions = fixed(), torch.arange(9)[None]
    graph = torch.fx.symbolic_trace(Turning(model.model.rotary_emb))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["rotary"]
    for dtype in (torch.float16, torch.float32):
        x = torch.zeros(1, 9, TINY.hidden, dtype=dtype)
        for found, exact in zip(graph(x, positions), model.model.rotary_emb(x, positions), strict=True):
            assert torch.equal(found, exact)


@pytest.mark.parametrize("name", ["mlp", "input_layernorm"])
def test_a_part_by_itself_is_refused(name: str) -> None:
    """Its graph would have no node for it. torch.fx's own words were about unpackString."""
    model = fixed()
    part = getattr(model.model.layers[0], name)
    with pytest.raises(qwen2_fp16_fix.SymbolicTraceError, match=r"trace the whole model"):
        torch.fx.symbolic_trace(part)
    qwen2_fp16_fix.unfix(model)
    torch.fx.symbolic_trace(part)  # as the sentence says


def test_a_layer_with_a_cache_is_refused() -> None:
    """A graph cannot hold a cache."""
    model = fixed()

    class Cached(Whole):
        def forward(self, embedded: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
            found: Tensor = self.layers[0](embedded, position_embeddings=(cos, sin), cache=object())
            return found

    with pytest.raises(qwen2_fp16_fix.SymbolicTraceError, match="without a cache"):
        torch.fx.symbolic_trace(Cached(model))
