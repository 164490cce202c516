"""The exponents of a layer at work: a model whose weights ask for each of them is proven, finite and as fp32 has it.

Every float16 tensor that torch computes in a forward is looked at, so no site is left out.
"""

import copy
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import planning
from qwen2_fp16_fix.patches.architecture import QWEN2
from qwen2_fp16_fix.patches.layer_plan import drop_plan
from qwen2_fp16_fix.patches.range_bounds import Exponents
from qwen2_fp16_fix.patches.range_plan import plan_layer
from tests.helpers import Quantised, kl_to
from tests.patches.adversary import Float16Numbers, worst_inputs
from tests.stress import TINY, build, random_prompt

PROMPT, LAYERS = random_prompt(TINY, batch=2, length=24), 2

#: KL to fp32 of these weights, nats. Ordinary ones are at 5e-7; an exponent rounds off a few small numbers more.
CLOSE = 5e-6

#: What is grown, by how much, and the exponents that ask for it. Queries are grown as keys shrink, and values as o_proj
#: does, else scores would be a maximum and the residual would hold nothing but one layer's output.
GROWN: dict[str, tuple[dict[str, float], set[str]]] = {
    "q": ({"self_attn.q_proj": 8e3, "self_attn.k_proj": 1e-3}, {"input_norm", "o_proj", "rotated"}),
    "k": ({"self_attn.k_proj": 8e3, "self_attn.q_proj": 1e-3}, {"input_norm", "o_proj", "rotated"}),
    "v": ({"self_attn.v_proj": 4e3, "self_attn.o_proj": 1e-2}, {"input_norm", "o_proj"}),
    "o_proj": ({"self_attn.o_proj": 3e4}, {"o_proj"}),
    "v and o_proj": ({"self_attn.v_proj": 4e3, "self_attn.o_proj": 30.0}, {"input_norm", "o_proj"}),
    "gate": ({"mlp.gate_proj": 4e3, "mlp.down_proj": 1e-3}, {"mlp", "post_norm"}),
    "up": ({"mlp.up_proj": 4e3, "mlp.down_proj": 1e-3}, {"mlp", "post_norm"}),
    "down_proj": ({"mlp.down_proj": 1e4}, {"mlp"}),
    "input_norm": (
        {"input_layernorm": 3e3, "self_attn.q_proj": 1e-3, "self_attn.k_proj": 1e-3},
        {"input_norm", "o_proj"},
    ),
    "post_norm": ({"post_attention_layernorm": 3e3, "mlp.down_proj": 1e-3}, {"mlp", "post_norm"}),
    "wide input_norm": (
        {"input_layernorm": 2e4, "self_attn.q_proj": 1e-4, "self_attn.k_proj": 1e-4},
        {"input_norm", "o_proj"},
    ),
    "wide post_norm": ({"post_attention_layernorm": 2e4, "mlp.down_proj": 1e-3}, {"mlp", "post_norm"}),
}
LARGE = pytest.mark.parametrize("grown", GROWN)


def grow(grown: str, **settings: Any) -> Any:
    """A stock model in fp32 of float16 weights, grown as the table says in every layer."""
    model = build(replace(TINY, layers=LAYERS), (), **settings)
    with torch.no_grad():
        for layer in model.model.layers:
            for name, factor in GROWN[grown][0].items():
                for parameter in layer.get_submodule(name).parameters():
                    parameter.mul_(factor).copy_(parameter.half())
    assert all(parameter.half().isfinite().all() for parameter in model.parameters())
    return model


def fixed(stock: Any) -> Any:
    """The same model in float16, fixed, with its plans made."""
    return qwen2_fp16_fix.fix(copy.deepcopy(stock).half())


def planned(model: Any) -> Exponents:
    """The exponents of the first layer."""
    exponents: Exponents = model.model.layers[0].plan.exponents
    return exponents


@LARGE
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_asks_for_an_exponent_is_proven_and_exact(grown: str, attention: str) -> None:
    """q, k, v, gate, up and the norms had a verdict and no exponent: such a model was not proven, and not finite."""
    stock = grow(grown, attn_implementation=attention)
    assert qwen2_fp16_fix.certify(stock).proven
    model = fixed(stock)
    with torch.no_grad(), Float16Numbers():
        logits = model(PROMPT).logits
    assert logits.isfinite().all()
    assert {name for name, exponent in planned(model)._asdict().items() if exponent} == GROWN[grown][1]
    with torch.no_grad():
        assert kl_to(stock(PROMPT).logits, logits) < CLOSE


@LARGE
def test_an_adversary_finds_no_number_beyond_its_limit(grown: str) -> None:
    """Inputs of every size at random, and those that climb to the largest number of each linear."""
    stock = grow(grown)
    model = fixed(stock)
    exact = copy.deepcopy(stock).double()
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    inputs = [worst_inputs(exact, lambda layer: linear_of(layer, name)) for name in names]  # noqa: B023
    generator = torch.Generator().manual_seed(0)
    for trial in range(12):
        found = torch.randn(1, 8, TINY.hidden, generator=generator)
        found[:, :, trial] *= 10.0 ** (trial % 5)  # one channel takes all the length
        inputs.append(found * 10.0 ** (trial % 4 - 1))
    with torch.no_grad(), Float16Numbers() as numbers:
        for each in inputs:
            each = each.clamp(-65504, 65504)
            assert model(inputs_embeds=each.half(), use_cache=False).logits.isfinite().all()
    assert len(numbers.seen) > 100


def linear_of(layer: Any, name: str) -> nn.Module:
    """The linear of that name in a layer."""
    found: nn.Module = getattr(layer.self_attn, name, None) or getattr(layer.mlp, name)
    return found


def test_the_adversary_would_find_what_is_not_scaled() -> None:
    """The same inputs overflow a layer whose exponents are taken away."""
    stock = grow("gate")
    model = fixed(stock)
    inputs = worst_inputs(copy.deepcopy(stock).double(), lambda layer: layer.mlp.gate_proj)
    for layer in model.model.layers:
        layer.mlp.keep_input_exponent(0)
    with torch.no_grad(), Float16Numbers(), pytest.raises(AssertionError, match="mm"):
        model(inputs_embeds=inputs.half(), use_cache=False)


@LARGE
def test_a_plan_that_ends_leaves_the_exponents_of_what_is_stored(grown: str) -> None:
    """Attention and MLP go on scaling their inputs; what follows is scaled by token. Unfixed, nothing is left."""
    stock = grow(grown)
    model = fixed(stock)
    layers = model.model.layers
    with torch.no_grad():
        model(PROMPT)
        before = [(layer.self_attn.ranges, layer.mlp.input_exponent) for layer in layers]
        for layer in layers:
            drop_plan(layer)
        logits = model(PROMPT).logits
        assert [(layer.self_attn.ranges, layer.mlp.input_exponent) for layer in layers] == before
        assert logits.isfinite().all()
        assert kl_to(stock(PROMPT).logits, logits) < CLOSE
    left = {"ranges", "input_exponent", "is_wide", "scale", "factor"}
    assert any(left & module.__dict__.keys() for module in model.modules())
    qwen2_fp16_fix.unfix(model)
    assert not any(left & module.__dict__.keys() for module in model.modules())


@LARGE
def test_autocast_scales_as_float16_weights_do(grown: str) -> None:
    """Under autocast the norm's output is fp32 and is cast by each matmul: past 65504 to infinity."""
    stock = grow(grown)
    model = qwen2_fp16_fix.fix(copy.deepcopy(stock))
    with torch.no_grad(), torch.autocast("cpu", torch.float16), Float16Numbers():
        logits = model(PROMPT).logits
    assert logits.isfinite().all()
    with torch.no_grad():
        assert kl_to(stock(PROMPT).logits, logits) < CLOSE
        assert torch.equal(model(PROMPT).logits, stock(PROMPT).logits)  # without autocast it is fp32, and stock


@LARGE
def test_bfloat16_is_not_scaled(grown: str) -> None:
    """It has the range; a norm that returned fp32 would meet weights of another dtype."""
    stock = grow(grown)
    model = qwen2_fp16_fix.fix(copy.deepcopy(stock).bfloat16())
    with torch.no_grad():
        logits = model(PROMPT).logits
        assert logits.isfinite().all()
        assert kl_to(stock(PROMPT).logits, logits) < 5e-3  # bfloat16's own error is at 2e-3 here


def gradients(model: Any, bits: int) -> dict[str, Tensor]:
    """Of the loss, computed of 2^bits times the loss under autocast, as a GradScaler does."""
    with torch.autocast("cpu", torch.float16):
        (model(PROMPT, labels=PROMPT, use_cache=False).loss * 2.0**bits).backward()
    return {name: parameter.grad * 2.0**-bits for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("grown", "checkpointing"), [*((grown, False) for grown in GROWN), ("v and o_proj", True), ("wide post_norm", True)]
)
def test_gradients_are_those_of_fp32(grown: str, checkpointing: bool) -> None:
    """Through the scaling and back, of fp32 weights under autocast, where a GradScaler keeps float16 finite."""
    stock = grow(grown)
    for bits in range(12, -2, -2):
        model = qwen2_fp16_fix.fix(copy.deepcopy(stock)).train()
        if checkpointing:
            model._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=False))
        found = gradients(model, bits)
        assert planned(model)  # the backward has made it suspect, and it was there in the forward
        if all(gradient.isfinite().all() for gradient in found.values()):
            break
    stock.train()(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    for name, parameter in stock.named_parameters():
        # Float16 gradients have 11 bits, fewer where they are subnormal. 0.003 without exponents, 0.05 at most here.
        assert (found[name] - parameter.grad).norm() <= 0.1 * parameter.grad.norm(), name


@pytest.mark.parametrize("grown", ["q", "v and o_proj", "wide input_norm", "wide post_norm"])
def test_a_compiled_forward_has_the_same_exponents(grown: str) -> None:
    """One graph, and the exponents are constants in it."""
    stock = grow(grown)
    model = fixed(stock)
    with torch.no_grad():
        expected = model(PROMPT).logits
        torch.compiler.reset()
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(PROMPT, use_cache=False).logits
        assert found.isfinite().all()
        assert kl_to(expected, found) < CLOSE


def keep(outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    """A hook that only reads."""
    outputs[name] = output.clone()


@LARGE
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hooks_see_what_stocks_would_and_leave_the_model_as_exact(grown: str, mode: Any) -> None:
    """On norms and projections: unscaled, and in fp32 where a number may pass float16's range."""
    stock = grow(grown)
    model = fixed(stock)
    names = ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    seen: dict[Any, dict[str, Tensor]] = {model: {}, stock: {}}
    with mode():
        expected = model(PROMPT).logits
        for each, outputs in seen.items():
            for name in (*names, "mlp.gate_proj", "mlp.up_proj"):
                part = each.model.layers[0].get_submodule(name)
                part.register_forward_hook(functools.partial(keep, outputs, name))
        logits = model(PROMPT).logits
        assert kl_to(expected, logits) < CLOSE  # a value that is watched is rounded twice
        assert kl_to(stock(PROMPT).logits, logits) < CLOSE
    for name, exact in seen[stock].items():
        found = seen[model][name].float()
        assert found.isfinite().all()
        # Float16's rounding of the input, of the weights' sums and, in the MLP, of attention's output.
        torch.testing.assert_close(found, exact, rtol=4e-3, atol=4e-3 * float(exact.abs().max()))


def test_a_projection_that_cannot_be_split_runs_behind_a_wide_norm() -> None:
    """With a backward hook it is called as it is, in stock's dtype; the norm has returned fp32."""
    model = fixed(grow("wide post_norm"))
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert model(PROMPT, use_cache=False).logits.dtype == torch.float16


@pytest.mark.parametrize(
    ("grown", "owner", "names"),
    [
        ("wide input_norm", "self_attn", ("q_proj", "k_proj", "v_proj")),
        ("wide post_norm", "mlp", ("gate_proj", "up_proj")),
    ],
    ids=["self_attn", "mlp"],
)
def test_linears_quantised_later_run_behind_a_wide_norm(grown: str, owner: str, names: tuple[str, ...]) -> None:
    """The fp32 output of the norm was taken for an fp32 model, and the last linear refused it."""
    model = fixed(grow(grown))
    for layer in model.model.layers:
        part = getattr(layer, owner)
        for name in names:
            setattr(part, name, Quantised.of(getattr(part, name)))
    with torch.no_grad():
        assert model(PROMPT).logits.isfinite().all()


def in_adapter(model: Any) -> Any:
    """The model in a LoRA that does something, with the same numbers in each dtype."""
    import peft

    names = [linear.name.rpartition(".")[2] for linear in QWEN2.linears]
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=2)).eval()
    generator = torch.Generator().manual_seed(0)
    for module in adapted.modules():
        if hasattr(module, "lora_B"):  # a tenth of the linear inside, whatever that was multiplied by
            size = module.base_layer.weight.float().square().mean().sqrt()
            for part, factor in ((module.lora_A, 1.0), (module.lora_B, 0.1 * size)):
                weight = part["default"].weight
                weight.data = (torch.randn(weight.shape, generator=generator) * factor).half().to(weight.dtype)
    return adapted


@LARGE
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks transformers
def test_an_adapter_leaves_the_exponents_of_the_linears_inside(grown: str) -> None:
    """The plan after the next `eval` found no weights to bound, and took the exponents away: NaN."""
    stock = grow(grown)
    model, oracle = in_adapter(fixed(stock)), in_adapter(stock)
    with torch.no_grad():
        wanted, before = oracle(PROMPT).logits, model(PROMPT).logits
        after = model.eval()(PROMPT).logits
    assert before.isfinite().all()
    assert torch.equal(before, after)
    # PEFT's own products are rounded in float16; where q_proj is shrunk, to subnormal numbers: 5e-5.
    assert kl_to(wanted, after) < 1e-4


def test_threads_that_meet_in_their_first_forward_make_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second found a layer that was planned in part: a centre, no exponents, and no plan due."""
    stock = grow("wide input_norm")
    expected = fixed(stock)(PROMPT).logits.detach()
    model = qwen2_fp16_fix.Qwen2ForCausalLM(stock.config).half().eval()
    with torch.no_grad():  # each layer makes its plan at its first forward
        for own, weight in zip(model.parameters(), stock.parameters(), strict=True):
            own.copy_(weight)
    bounding, made = threading.Event(), []

    def slow(*layer: Any) -> Any:
        made.append(threading.get_ident())
        bounding.set()
        time.sleep(0.05)
        return plan_layer(*layer)

    monkeypatch.setattr(planning, "plan_layer", slow)

    def run() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(PROMPT).logits
        return found

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(run)
        bounding.wait(10)
        found = [each.result() for each in (first, *(pool.submit(run) for _ in range(3)))]
    assert len(made) == LAYERS
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("grown", ["q", "wide input_norm", "wide post_norm"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_scan_sees_no_site_pass_its_bound(grown: str, attention: str) -> None:
    """Sites that hooks see unscaled are in fp32, and in the units of their bounds; so are scores of scaled keys."""
    stock = grow(grown, attn_implementation=attention)
    found = qwen2_fp16_fix.scan(fixed(stock), prompts=[PROMPT[0].tolist()])
    assert found.finite, found.verdict
    bounded = [site for site in found.sites if site.bound is not None]
    assert {"input_norm", "q", "attention", "gate", "product", "scaled_scores"} <= {site.site for site in bounded}
    for site in bounded:
        assert site.largest is not None
        assert site.largest <= site.bound * 1.04, (site.layer, site.site)  # 65 roundings of float16
    raw = {site.site: site.largest for site in found.sites if site.layer == 0}
    exact = qwen2_fp16_fix.scan(copy.deepcopy(stock).half(), prompts=[PROMPT[0].tolist()])
    scores = {site.site: site.largest for site in exact.sites if site.layer == 0}
    assert raw["scaled_scores"] == pytest.approx(scores["scaled_scores"], rel=0.5)  # a centre moves all; a scale by 4


def test_an_attention_that_may_not_scale_scores_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of 2^-e of their size in a function that reads the factor of the scores too early: finite and wrong."""
    table = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    stock = table["sdpa"]
    monkeypatch.setitem(table._global_mapping, "own", lambda *args, **kwargs: stock(*args, **kwargs))
    model = fixed(grow("k"))
    assert torch.isfinite(model(PROMPT).logits).all()
    model.set_attn_implementation("own")
    with pytest.raises(qwen2_fp16_fix.HalfPrecisionScoresError, match="'own' is not transformers' own"):
        model(PROMPT)
    model.float()
    assert torch.isfinite(model(PROMPT).logits).all()
