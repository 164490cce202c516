"""Weights that are not where, or not what, a layer has: replicas, pruning, shards, linears that cast by themselves.

With each of these a stock model runs, so a fixed one has to, without a plan where its weights cannot be bounded.
"""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import range_sums, scaling
from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import STOCK_OF
from tests.helpers import kl_to, replicated
from tests.stress import TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=1, length=24)
#: KL to fp32 of a fixed model, nats: the conformance suite's limit, an order above the rounding of 11 bits.
CLOSE = 2e-5


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=PROMPT, use_cache=False).logits.float()
    return found


def fixed(*kinds: str, **settings: Any) -> Any:
    return qwen2_fp16_fix.fix(build(TINY, kinds, **settings).half())


def ranges(model: Any, site: str = "mlp") -> list[Any]:
    return [getattr(row, site) for row in qwen2_fp16_fix.status(model).model.ranges]


@pytest.mark.parametrize("grad", [False, True])
def test_a_replica_runs_without_its_parameters(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """DataParallel hands each device tensors that are plain attributes; only the way to a GPU is left out here."""
    model = fixed("swiglu")
    with torch.set_grad_enabled(grad):
        replica = replicated(model, monkeypatch, detach=not grad)
        got = replica(input_ids=PROMPT, use_cache=False).logits.detach().float()
    assert torch.isfinite(got).all()
    assert kl_to(logits(build(TINY, ("swiglu",))), got) < CLOSE


def test_a_pruned_weight_is_no_parameter() -> None:
    model = build(TINY, ()).half()
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.down_proj):
            prune.l1_unstructured(linear, "weight", amount=0.1)
    oracle = logits(model.float())
    assert kl_to(oracle, logits(qwen2_fp16_fix.fix(model.half()))) < CLOSE
    assert ranges(model) == ["by token"] * TINY.layers


def test_empty_parameters_are_gathered_when_they_are_needed() -> None:
    """ZeRO-3 keeps the whole ones elsewhere until a module runs: a plan or a centre made of nothing would be wrong."""
    model = build(TINY, ("swiglu",)).half()
    whole = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0, dtype=torch.float16)
    qwen2_fp16_fix.fix(model)
    assert ranges(model) == ["by token"] * TINY.layers
    assert ranges(model, "keys") == ["not centred"] * TINY.layers
    for name, parameter in model.named_parameters():
        parameter.data = whole[name]
    assert kl_to(logits(build(TINY, ("swiglu",))), logits(model)) < CLOSE


def test_a_shard_that_looks_like_a_weight_is_not_bounded() -> None:
    """transformers 5.1 to 5.14 hold a rank's part of a weight as a plain parameter: half of a layer's numbers."""
    model = build(TINY, ()).half()
    for name in ("gate_proj", "up_proj"):
        weight = getattr(model.model.layers[0].mlp, name).weight
        weight.data = weight.data[: TINY.intermediate // 2]
    assert ranges(qwen2_fp16_fix.fix(model)) == ["by token", *[0] * (TINY.layers - 1)]


def test_what_cannot_be_planned_is_left_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fix` raises and has changed nothing, also where it was planning that failed."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    model = build(TINY, ()).half()
    monkeypatch.setattr(sys.modules[qwen2_fp16_fix.patches.planning.__name__], "plan_layer", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        qwen2_fp16_fix.fix(model)
    assert not {type(module) for module in model.modules()} & set(STOCK_OF)


@pytest.mark.parametrize("activation", ["quick_gelu", "relu2"])
def test_an_activation_the_bounds_do_not_know_scales_by_token(activation: str) -> None:
    """An exponent of 24, for a bound that is infinite, would flush every product below 1."""
    model = fixed(hidden_act=activation)
    assert ranges(model) == ["by token"] * TINY.layers
    assert kl_to(logits(build(TINY, (), hidden_act=activation)), logits(model)) < CLOSE


class Int8Outliers(nn.Module):
    """Stands for LLM.int8 (Dettmers et al. 2022): inputs in columns past a threshold stay float16, the rest is int8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight.float() * self.scale.float()
        outliers = (hidden_states.abs() > 6).flatten(0, -2).any(0)
        kept, rest = hidden_states.float() * outliers, hidden_states.float() * ~outliers
        step = rest.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return ((kept + (rest / step).round() * step) @ weight.T).to(hidden_states.dtype)


def test_llm_int8_still_sees_its_outliers() -> None:
    """It finds them by an absolute threshold: brought to magnitudes of 1 first, none would pass it, unheard."""
    torch.manual_seed(1)
    linear = Int8Outliers(nn.Linear(TINY.intermediate, TINY.hidden, bias=False).half())
    activation = torch.randn(1, 8, TINY.intermediate)
    activation[..., 3] = 1000.0
    exact = activation.double() @ (linear.weight.double() * linear.scale.double()).T
    plain, scaled = linear(activation.half()).double(), scaling.linear_by_token(linear, activation, TINY.intermediate)
    off = [(found - exact).norm() / exact.norm() for found in (plain, scaled.double())]
    assert off[1] < 1.1 * off[0]  # other float16 steps; with magnitudes of 1 at most it is 77 times


class CastsItself(nn.Linear):
    """Stands for bitsandbytes' 4-bit linear: computes in `compute_dtype` and returns what it was handed."""

    compute_dtype = torch.float16

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]  # nn.Linear calls it input
        product = nn.functional.linear(hidden_states.half(), self.weight.half())
        bias = 0 if self.bias is None else self.bias
        return (product + bias).to(hidden_states.dtype)


@pytest.mark.parametrize("site", ["down_proj", "o_proj"])
def test_linears_that_cast_fp32_to_float16_are_scaled(site: str) -> None:
    """prepare_model_for_kbit_training makes the norms fp32, so what reaches the linears looks safe and is not."""
    model = build(TINY, ("swiglu",) if site == "down_proj" else (), attn_implementation="sdpa")
    for layer in model.model.layers if site == "o_proj" else ():
        for linear in (layer.self_attn.v_proj, layer.self_attn.o_proj):
            linear.weight.data *= 512
    oracle = logits(model)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for linear in parent.children():
                if isinstance(linear, nn.Linear):
                    linear.__class__ = CastsItself
    assert not torch.isfinite(logits(model)).all()
    got = logits(qwen2_fp16_fix.fix(model))
    assert torch.isfinite(got).all()
    assert kl_to(oracle, got) < CLOSE


def test_a_gain_in_fp32_is_not_bounded_by_its_rounding() -> None:
    """Under autocast the norm multiplies by the fp32 gain itself, which float16 may have rounded down."""
    gain = torch.full((8,), 1 + 2.0**-12)
    assert (range_sums.norm_gain_bound(gain) >= gain).all()
