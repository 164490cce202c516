"""The range plan at work: what it costs, what it saves, and that it never outlives the weights it was made from."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import qwen2_fp16_fix
from benchmarks.cost import cost_of
from qwen2_fp16_fix.patches.attention import project_output
from qwen2_fp16_fix.patches.attention_form import Form
from qwen2_fp16_fix.patches.blocks import MLP
from qwen2_fp16_fix.patches.caches import STOCK as STOCK_KEYS
from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import STOCK
from qwen2_fp16_fix.patches.planning import plan_layers
from qwen2_fp16_fix.patches.scaling import linear_by_token
from tests.helpers import kl_to
from tests.stress import KINDS, TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=2, length=24)


def logits(model: Any, tokens: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def exponents(model: Any) -> list[Any]:
    return [row.mlp for row in qwen2_fp16_fix.status(model).model.ranges]


def fixed(*kinds: str, attention: str = "eager") -> Any:
    return qwen2_fp16_fix.fix(build(TINY, kinds, attn_implementation=attention).half())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kinds", [("swiglu",), ("moe57",), ("massive",), KINDS], ids="+".join)
def test_every_stress_is_finite_and_close(kinds: tuple[str, ...], attention: str) -> None:
    """SwiGLU products of 4,300, outputs of 70,000 and partial sums of 120,000 that cancel; and everything at once."""
    oracle = logits(build(TINY, kinds, attn_implementation=attention))
    got = logits(fixed(*kinds, attention=attention))
    assert torch.isfinite(got).all()
    assert kl_to(oracle, got) < 4e-5  # rounding: 5e-7 with one kind, 1.5e-5 with all, of keys in pairs that turn


def test_stock_is_not_finite_where_the_plan_is() -> None:
    assert not torch.isfinite(logits(build(TINY, ("swiglu",)).half())).all()
    assert max(exponents(fixed("swiglu"))) > 0


def test_ordinary_layers_need_no_exponent() -> None:
    assert exponents(fixed()) == [0] * TINY.layers


def test_an_exponent_of_zero_costs_nothing() -> None:
    """A layer that needs no exponent runs stock's arithmetic, kernel for kernel."""
    stock, ours = build(TINY, ()).half().model.layers[0].mlp, fixed().model.layers[0].mlp
    hidden = torch.randn(1, 4, TINY.hidden).half()
    before, after = cost_of(lambda: stock(hidden)), cost_of(lambda: ours(hidden))
    assert after.launches == before.launches
    assert before.moved > 2 * 3 * TINY.hidden * TINY.intermediate  # the weights at least
    assert torch.equal(ours(hidden), stock(hidden))


def test_an_exponent_costs_one_kernel() -> None:
    """The scaled product takes the place of the product; only the way back to the residual is extra."""
    stock, ours = build(TINY, ()).half().model.layers[0].mlp, fixed().model.layers[0].mlp
    hidden = torch.randn(1, 4, TINY.hidden).half()
    ours.set_exponent(3)
    before, after = cost_of(lambda: stock(hidden)), cost_of(lambda: ours(hidden))
    assert after.kernels == before.kernels + 1
    assert "addcmul" in {launch.name for launch in after.launches}
    assert ours(hidden).dtype == torch.float32
    torch.testing.assert_close(
        ours(hidden), stock(hidden).float(), rtol=2e-3, atol=1e-5
    )  # float16's rounding, once less


def test_the_cost_in_precision_is_nothing() -> None:
    """Powers of two are exact. KL goes with the squared error: an exponent of 5 adds less than 1 % to it."""
    generator = torch.Generator().manual_seed(0)
    shape = replace(TINY, hidden=896, heads=14, intermediate=4864)
    mlp: Any = qwen2_fp16_fix.fix(build(shape, ()).half()).model.layers[0].mlp
    hidden = torch.randn(256, shape.hidden, generator=generator).half()
    gate, up = (getattr(mlp, name).weight.double() @ hidden.double().T for name in ("gate_proj", "up_proj"))
    exact = (mlp.down_proj.weight.double() @ (nn.functional.silu(gate) * up)).T
    errors = []
    for exponent in (1, 5):
        mlp.set_exponent(exponent)
        with torch.no_grad():
            errors.append(float((mlp(hidden).double() - exact).square().mean()))
    assert errors[1] < 1.01 * errors[0]


def test_the_plan_compiles_in_one_graph() -> None:
    model = fixed("swiglu")
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(input_ids=PROMPT, use_cache=False).logits.float()
    assert kl_to(logits(model), got) < 1e-6  # a compiler takes addcmul apart: fp32 roundings of its own


def grown(model: Any) -> Any:
    """A state dict whose first MLP multiplies 64 times as much, which the plan of the old weights does not cover."""
    state = copy.deepcopy(model.state_dict())
    for name in ("gate_proj", "up_proj"):
        state[f"model.layers.0.mlp.{name}.weight"] *= 64
    return state


def check_after_growth(model: Any, expected: Any) -> None:
    """Finite and close, and the exponent is either the new weights' or each token's."""
    oracle = build(TINY, ())
    oracle.load_state_dict({name: weight.float() for name, weight in grown(oracle.half()).items()})
    assert exponents(model)[0] == expected
    got = logits(model)
    assert torch.isfinite(got).all()
    assert kl_to(logits(oracle.float()), got) < 2e-5


def test_load_state_dict_plans_anew() -> None:
    model = fixed()
    model.load_state_dict(grown(model))
    check_after_growth(model, exponents(qwen2_fp16_fix.fix(copy.deepcopy(model)))[0])


def test_load_state_dict_ends_a_plan_before_anything_runs() -> None:
    """What is compiled next would take the old exponents for constants, and does not look at weights."""
    model = fixed()
    model.load_state_dict({"lm_head.weight": model.lm_head.weight}, strict=False)
    assert [layer.mlp.exponent for layer in model.model.layers] == [0] * TINY.layers
    model.load_state_dict(grown(model))
    assert [layer.mlp.exponent for layer in model.model.layers] == [None] * TINY.layers


def test_load_state_dict_of_a_drop_in_class_plans_anew() -> None:
    model = qwen2_fp16_fix.Qwen2ForCausalLM(build(TINY, ()).config).half().eval()
    model.load_state_dict(grown(build(TINY, ()).half()))
    assert isinstance(exponents(model)[0], int)
    assert exponents(model)[0] > 0
    assert torch.isfinite(logits(model)).all()


def test_an_edit_in_place_ends_a_plan() -> None:
    model = fixed()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(64)
        model.model.layers[0].mlp.up_proj.weight.mul_(64)
    check_after_growth(model, "by token")


def test_fixing_again_plans_anew() -> None:
    model = fixed()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(64)
        model.model.layers[0].mlp.up_proj.weight.mul_(64)
    assert isinstance(exponents(qwen2_fp16_fix.fix(model))[0], int)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks transformers for it
@pytest.mark.parametrize("ran_between", [False, True])
def test_merging_an_adapter_ends_a_plan(ran_between: bool) -> None:
    """PEFT merges through `.data`, which leaves no trace on the weight: the change of modules does."""
    import peft

    model = fixed()
    settings = peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings).eval()
    if ran_between:
        assert torch.isfinite(logits(wrapped)).all()
        assert exponents(wrapped) == ["by token"] * TINY.layers
    merged = wrapped.merge_and_unload()
    assert exponents(merged) == ["by token"] * TINY.layers
    assert torch.isfinite(logits(merged)).all()


def test_a_linear_replaced_ends_a_plan() -> None:
    """As quantising after load does, through setattr or straight into `_modules`."""
    model = fixed()
    model.model.layers[0].mlp.down_proj = nn.Linear(TINY.intermediate, TINY.hidden, bias=False).half()
    model.model.layers[1].mlp._modules["down_proj"] = nn.Linear(TINY.intermediate, TINY.hidden, bias=False).half()
    assert exponents(model) == ["by token", "by token", *[0] * (TINY.layers - 2)]


def test_a_cast_to_float16_keeps_a_plan_and_one_to_bfloat16_ends_it() -> None:
    model = qwen2_fp16_fix.fix(build(TINY, ("swiglu",)))
    planned = exponents(model)
    assert max(planned) > 0
    assert exponents(model.half()) == planned
    assert torch.isfinite(logits(model)).all()
    model.bfloat16()  # which has rounded the weights
    assert [layer.mlp.exponent for layer in model.model.layers] == [None] * TINY.layers
    assert exponents(model.half()) == exponents(qwen2_fp16_fix.fix(copy.deepcopy(model)))
    assert torch.isfinite(logits(model)).all()


def test_scaling_by_token_is_as_good_as_the_plan() -> None:
    """What a quantised, sharded or offloaded layer falls back on."""
    oracle, model = logits(build(TINY, ("swiglu", "moe57"))), fixed("swiglu", "moe57")
    for layer in model.model.layers:
        layer.mlp.set_exponent(None)
        layer.self_attn.set_exponent(None)
    assert kl_to(oracle, logits(model)) < 2e-5


def test_scaling_by_token_holds_products_that_float16_cannot() -> None:
    """300 · 300 is past 65504 before any scaling: the product has to be taken in fp32, and the way back as well."""
    mlp = fixed().model.layers[0].mlp
    mlp.set_exponent(None)
    hidden = torch.ones(1, 2, TINY.hidden).half()
    for name in ("gate_proj", "up_proj"):
        getattr(mlp, name).weight.data.fill_(300 / TINY.hidden)
    mlp.down_proj.weight.data.fill_(1 / 128)
    expected = 300.0 * 300 * TINY.intermediate / 128
    torch.testing.assert_close(mlp(hidden), torch.full(hidden.shape, expected), rtol=3e-3, atol=0)  # three roundings


def project(attention: Any, heads: torch.Tensor, values: int = 0) -> torch.Tensor:
    """The output projection of heads (1, S, channels) whose values are stored times 2^-values."""
    hidden = torch.empty(*heads.shape[:2], TINY.hidden)
    return project_output(attention, heads * 2.0**-values, hidden, torch.float16, Form(None, None, STOCK_KEYS, values))


def test_output_projections_scale_by_token_and_by_plan() -> None:
    """Values of 6e4 times weights of 1 pass the range in o_proj whatever the heads say."""
    attention = fixed().model.layers[0].self_attn
    attention.o_proj.weight.data.fill_(1.0)
    heads = torch.full((1, 2, TINY.hidden), 6e4).half()
    expected = heads.float().sum(-1, keepdim=True).expand(1, 2, TINY.hidden)
    for exponent, values in ((None, 0), (None, 8), (8, 8), (8, 0)):  # values of a cache may be older than a plan
        attention.set_exponent(exponent)
        torch.testing.assert_close(project(attention, heads, values), expected, rtol=1e-3, atol=0)  # one rounding


def test_scaling_by_token_is_handed_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exponents are specified for fp32: float16 has none below -24 to scale by."""
    handed: list[torch.dtype] = []

    def spy(linear: nn.Module, activation: torch.Tensor, width: int) -> torch.Tensor:
        handed.append(activation.dtype)
        return torch.zeros(*activation.shape[:-1], TINY.hidden)

    for function in (project_output, MLP.forward):
        monkeypatch.setattr(sys.modules[function.__module__], "linear_by_token", spy)
    layer = fixed().model.layers[0]
    layer.mlp.set_exponent(None)
    layer.self_attn.set_exponent(None)
    hidden = torch.randn(1, 2, TINY.hidden).half()
    project(layer.self_attn, hidden)
    layer.mlp(hidden)
    assert handed == [torch.float32, torch.float32]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_bias_is_not_scaled(wrapped: bool) -> None:
    """2^e · (W · 2^-e x + b) is not Wx + b; the bias may sit inside what wraps the linear, as lora_bias does.

    Products of 2^18, which float16 cannot hold: the tokens are scaled, and off by float16's rounding at most.
    """
    model = fixed()
    mlp = model.model.layers[0].mlp
    biased = nn.Linear(TINY.intermediate, TINY.hidden, bias=True).half()
    with torch.no_grad():
        mlp.gate_proj.weight.mul_(2.0**10)
        mlp.up_proj.weight.mul_(2.0**9)
    mlp.down_proj = nn.Sequential(biased) if wrapped else biased
    mlp.down_proj.weight = biased.weight
    hidden = torch.randn(1, 4, TINY.hidden).half()
    product = mlp.act_fn(mlp.gate_proj(hidden)).double() * mlp.up_proj(hidden).double()
    assert product.abs().max() > 65504
    exactly = nn.functional.linear(product, biased.weight.double(), biased.bias.double())
    off = (mlp(hidden).double() - exactly).norm() / exactly.norm()
    assert off < 2.0**-10
    qwen2_fp16_fix.fix(model)
    assert exponents(model)[0] == "by token"


def test_a_bias_is_taken_off_in_fp32() -> None:
    """In float16 it would be one more rounding, of what is then scaled up."""
    linear = nn.Linear(TINY.intermediate, TINY.hidden).half().requires_grad_(False)
    activation = torch.randn(1, 4, TINY.intermediate) * 2.0**-8
    activation[..., 0] = 0.75 * 2.0**9  # the exponent is 9 for every token
    output, bias = linear((activation * 2.0**-9).half()).double(), linear.bias.double()
    expected = (output - bias) * 2.0**9 + bias
    found = linear_by_token(linear, activation, TINY.intermediate)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)  # fp32's rounding of sums near 300


def test_a_shard_that_knows_no_others_is_an_error() -> None:
    attention = fixed().model.layers[0].self_attn
    attention.set_exponent(None)
    attention.o_proj = nn.Linear(TINY.hidden // 2, TINY.hidden, bias=False).half()
    with pytest.raises(qwen2_fp16_fix.ShardedRangeError, match="which ranks"):
        project(attention, torch.randn(1, 2, TINY.hidden // 2).half())


def test_a_plain_shard_finds_the_others_by_its_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.3 to 5.14 keep the mesh on the module, and a rank's part of the weight as a plain parameter."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda exponent, how, group: asked.append((how, group)))
    attention = fixed().model.layers[0].self_attn
    attention.o_proj = nn.Linear(TINY.hidden // 2, TINY.hidden, bias=False).half()
    attention.o_proj._hf_device_mesh = SimpleNamespace(get_group=lambda: "all ranks")
    project(attention, torch.randn(1, 2, TINY.hidden // 2).half())
    assert asked == [(torch.distributed.ReduceOp.MAX, "all ranks")]


def test_scaling_by_token_looks_at_no_other_token() -> None:
    model = fixed("swiglu")
    for layer in model.model.layers:
        layer.mlp.set_exponent(None)
    changed = PROMPT.clone()
    changed[:, 16:] = (changed[:, 16:] + 1) % TINY.vocab
    assert torch.equal(logits(model)[:, :16], logits(model, changed)[:, :16])


def test_from_pretrained_plans(tmp_path: Path) -> None:
    build(TINY, ("swiglu",)).half().save_pretrained(tmp_path)
    model = qwen2_fp16_fix.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert exponents(model) == exponents(fixed("swiglu"))


def test_unfix_leaves_nothing_of_the_plan() -> None:
    model = qwen2_fp16_fix.unfix(fixed("swiglu"))
    of_plan, beyond_it = {"scale", "plan", "plan_due", "rotary", "watch"}, {"ranges", "factor", "input_exponent"}
    for module in model.modules():
        assert not (of_plan | beyond_it | {"centre", "is_wide"}) & set(module.__dict__)
    assert type(model.model.layers[0].mlp) is STOCK.Qwen2MLP


def test_layers_without_weights_are_not_planned() -> None:
    model = fixed()
    model.model.layers[0].to("meta")
    plan_layers(model.model)
    assert exponents(model) == ["by token", *[0] * (TINY.layers - 1)]


SHARDED = """
import os, sys, torch, qwen2_fp16_fix, torch.distributed as dist
dist.init_process_group("gloo")
qwen2_fp16_fix.register()
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float16, tp_plan="auto", attn_implementation="eager"
).eval()
ranges = qwen2_fp16_fix.status(model).model.ranges
assert {row.mlp for row in ranges} == {"by token"}, ranges
with torch.no_grad():
    logits = model(input_ids=torch.load(sys.argv[2])).logits
logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
if dist.get_rank() == 0:
    torch.save(logits.float(), sys.argv[3])
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads may outlive Python's end, which aborts the process then
"""


def test_tensor_parallel_ranks_scale_in_step(tmp_path: Path, python: Callable[..., Any]) -> None:
    """A maximum taken on one shard is silently wrong: top-1 43 % in two engines, without a NaN or a warning."""
    oracle = build(TINY, ("swiglu",))
    oracle.half().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "sharded.py").write_text(SHARDED)
    torch.save(PROMPT, tmp_path / "prompt.pt")
    files = [str(tmp_path / name) for name in ("checkpoint", "prompt.pt", "logits.pt")]
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "sharded.py"))
    done = python(*launch, *files, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert kl_to(logits(oracle.float()), torch.load(tmp_path / "logits.pt")) < 2e-5
