"""Projections that are not plain: watched, wrapped, quantised, elsewhere. The product alone, or all as in stock."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import linears
from tests.helpers import Quantised, kl_to, replicated
from tests.patches.models import (
    CLOSE,
    EXACT,
    PROMPT,
    ROUNDED,
    adapted,
    attentions,
    error,
    half,
    logits,
    quantised,
    states,
    stock_error,
)
from tests.stress import TINY, build, random_prompt

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks transformers


def test_the_limits_lie_apart() -> None:
    assert stock_error() > 100 * CLOSE
    assert error(qwen2_fp16_fix.fix(half())) < CLOSE


# --- who looks on ---

HOOKS = {"hook": "forward_hook", "pre-hook": "forward_pre_hook", "backward hook": "full_backward_hook"}


def hook(owner: Any, kind: str, function: Callable[..., Any]) -> Any:
    everywhere = "module_" if owner is nn.modules.module else ""
    return getattr(owner, f"register_{everywhere}{HOOKS[kind]}")(function)


@pytest.mark.parametrize("where", ["q_proj", "k_proj", "everywhere"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_sees_what_stocks_hook_would_see(kind: str, where: str) -> None:
    """The module itself, its input, product and bias in one and rounded; and `status` says that they are."""
    model = qwen2_fp16_fix.fix(half())
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(2, 5, TINY.hidden).half().requires_grad_()
    names = ["q_proj", "k_proj"] if where == "everywhere" else [where]
    wanted = {getattr(attention, name): getattr(attention, name)(hidden) for name in names}
    seen: dict[nn.Module, Any] = {}
    handle = hook(getattr(attention, where, nn.modules.module), kind, lambda module, *call: seen.update({module: call}))
    for name in names:
        linears.project_exactly(getattr(attention, name), hidden).float().sum().backward()
    assert states(model) == ROUNDED if where == "everywhere" else states(model) == ROUNDED | EXACT
    handle.remove()
    assert states(model) == EXACT
    for module, output in wanted.items():
        if kind == "backward hook":
            assert seen[module][1][0].shape == output.shape
        else:
            found, expected = (seen[module][0][0], hidden) if kind == "pre-hook" else (seen[module][1], output)
            assert torch.equal(found, expected)
            assert found.dtype == torch.float16


@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
def test_a_hook_that_only_looks_changes_nothing(kind: str) -> None:
    """To the bit. A model that is watched would else be another than the one that is run."""
    model = qwen2_fp16_fix.fix(half())
    expected, seen = logits(model), []
    for attention in attentions(model):
        for projection in (attention.q_proj, attention.k_proj):
            hook(projection, kind, lambda module, *call: seen.append(module))
    assert torch.equal(logits(model), expected)
    assert len(set(seen)) == len(seen) == 2 * TINY.layers


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", ["hook", "hook in place", "pre-hook"])
def test_a_hook_that_changes_something_changes_the_result(kind: str, everywhere: bool, mode: Any) -> None:
    """As activation patching does: what it returns, or writes, is what is rotated."""
    k_proj = qwen2_fp16_fix.fix(half()).model.layers[0].self_attn.k_proj
    hidden = torch.randn(2, 5, TINY.hidden).half()

    def change(module: nn.Module, inputs: tuple[Tensor], output: Tensor | None = None) -> Any:
        if output is None:
            return (torch.zeros_like(inputs[0]),)
        if kind == "hook":
            return torch.zeros_like(output)
        output.detach().zero_()
        return None

    handle = hook(nn.modules.module if everywhere else k_proj, kind.removesuffix(" in place"), change)
    try:
        with mode():
            found = linears.project_exactly(k_proj, hidden)
    finally:
        handle.remove()
    assert torch.equal(found, (k_proj.bias if kind == "pre-hook" else torch.zeros(())).expand_as(found))


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_gradients_reach_what_a_hook_was_shown(name: str) -> None:
    """Attribution tools keep activations and ask for their gradients."""
    model = qwen2_fp16_fix.fix(half())
    shown: list[Tensor] = []
    getattr(attentions(model)[1], name).register_forward_hook(lambda _, __, output: shown.append(output))
    loss = model(input_ids=PROMPT, use_cache=False).logits.float().square().mean()
    (gradient,) = torch.autograd.grad(loss, shown)
    assert gradient.abs().max() > 0


def test_what_a_hook_writes_through_data_counts() -> None:
    """As interventions do; torch counts no such write."""
    model = qwen2_fp16_fix.fix(half())
    with torch.no_grad():
        before = model(input_ids=PROMPT, use_cache=False).logits

        def write(_: Any, __: Any, output: Tensor) -> None:
            output.data.zero_()

        handle = attentions(model)[1].q_proj.register_forward_hook(write)
        written = model(input_ids=PROMPT, use_cache=False).logits
        handle.remove()
        attentions(model)[1].q_proj.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        assert torch.equal(written, model(input_ids=PROMPT, use_cache=False).logits)
    assert not torch.equal(before, written)


def test_a_forward_of_somebody_elses_is_called_and_adds_the_bias_once() -> None:
    """It is bound to the module, whose bias it finds: nothing may be added to what it returns."""
    model = qwen2_fp16_fix.fix(half())
    expected, calls = logits(model), 0
    for attention in attentions(model):
        for projection in (attention.q_proj, attention.k_proj):
            forward = projection.forward

            def wrapped(hidden: Tensor, forward: Any = forward) -> Any:
                nonlocal calls
                calls += 1
                return forward(hidden)

            projection.forward = wrapped
    assert kl_to(expected, logits(model)) < 2 * stock_error()  # twice the bias: 1 and more
    assert calls == 2 * TINY.layers
    assert states(model) == ROUNDED


# --- where the weights are ---


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_accelerate_bring_the_weights_and_round_nothing(when: str) -> None:
    """`device_map` puts a forward into every module. Offloaded weights are there only while it runs."""
    import accelerate

    plain = logits(qwen2_fp16_fix.fix(half()))
    model = half()
    if when == "after":
        qwen2_fp16_fix.fix(model)
    accelerate.hooks.attach_execution_device_hook(model, torch.device("cpu"))
    model = qwen2_fp16_fix.fix(model)
    assert "forward" in vars(model.model.layers[0].self_attn.k_proj)
    assert states(model) == EXACT
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("under", [False, True], ids=["alone", "under LoRA"])
def test_offloaded_weights_are_where_they_are_needed_and_gone_again(under: bool) -> None:
    import accelerate
    import peft

    model = half()
    if under:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"])).eval()
    accelerate.cpu_offload(model, torch.device("cpu"))
    qwen2_fp16_fix.fix(model)
    assert states(model) == EXACT
    assert error(model) < CLOSE
    linear = linears.inner_linear(attentions(model)[0].k_proj)
    assert linear.weight.is_meta
    assert linear.bias.is_meta


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_weight_that_is_computed_is_computed() -> None:
    """torch.nn.utils.parametrize changes the class and makes the weight a property; pruning has a hook compute it."""
    model = half()
    for attention in attentions(model):
        attention.k_proj.weight.data /= 2
        parametrize.register_parametrization(attention.k_proj, "weight", Doubled())
    assert error(qwen2_fp16_fix.fix(model)) < CLOSE
    assert states(model) == EXACT
    k_proj = attentions(model)[0].k_proj
    linears.project_exactly(k_proj, torch.ones(1, TINY.hidden).half()).sum().backward()
    assert (k_proj.parametrizations.weight.original.grad == 2).all()
    model = half()
    for attention in attentions(model):
        prune.identity(attention.k_proj, "weight")
    assert error(qwen2_fp16_fix.fix(model)) < CLOSE
    assert states(model) == ROUNDED  # of hooks it is not known what they will do


class Unheard(Quantised):
    """The same, of a library nobody has looked at."""

    __module__ = "elsewhere.nn"


@functools.cache
def quantised_oracle() -> Tensor:
    model = build(TINY, ("keys",))
    for attention in attentions(model):
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.data = Quantised.of(projection.half()).dequantised(torch.float32)
            projection.float()
    return logits(model)


@pytest.mark.parametrize("first", ["fixed", "quantised"])
def test_a_quantised_projection_keeps_its_bias_exact(first: str) -> None:
    """To the bit what the product and the bias are apart."""
    model = quantised(first)
    k_proj = attentions(model)[0].k_proj
    hidden = torch.randn(2, 3, TINY.hidden).half()
    without = Quantised.of(k_proj_of(half()))
    bias, without.bias = k_proj.bias, None
    assert torch.equal(linears.project_exactly(k_proj, hidden), without(hidden) + bias.float())
    assert torch.equal(k_proj(hidden), without(hidden) + bias)  # itself it is as it was
    assert states(model) == EXACT
    assert kl_to(quantised_oracle(), logits(model)) < CLOSE


def k_proj_of(model: Any) -> Any:
    return model.model.layers[0].self_attn.k_proj


def test_a_linear_that_nobody_has_looked_at_is_rounded_as_in_stock() -> None:
    """What it does with its bias is not known: a scale after it would make ours wrong, and nothing would show it."""
    model = quantised(kind=Unheard)
    assert states(model) == ROUNDED
    hidden = torch.randn(2, 3, TINY.hidden).half()
    k_proj = attentions(model)[0].k_proj
    assert torch.equal(linears.project_exactly(k_proj, hidden), k_proj(hidden))
    assert kl_to(quantised_oracle(), logits(model)) < 2 * stock_error()


@pytest.mark.parametrize("kind", ["quantised", "LoRA", "beneath LoRA"])
def test_a_hook_on_what_goes_through_a_view_is_called_with_the_whole(kind: str) -> None:
    model = quantised() if kind == "quantised" else adapted()
    k_proj = attentions(model)[0].k_proj
    hooked = k_proj.base_layer if kind == "beneath LoRA" else k_proj
    hidden, seen = torch.randn(2, 3, TINY.hidden).half(), []
    hooked.register_forward_hook(lambda module, inputs, output: seen.append((module, output)))
    found = linears.project_exactly(k_proj, hidden)
    assert seen[0][0] is hooked
    assert torch.equal(seen[0][1], hooked(hidden))
    assert torch.equal(found, k_proj(hidden))
    assert states(model) == EXACT | ROUNDED


@pytest.mark.parametrize("kind", ["plain", "quantised", "LoRA"])
def test_a_replica_adds_its_bias_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are attributes of the object: a class attribute `bias = None` would lose to them."""
    model = {"plain": lambda: qwen2_fp16_fix.fix(half()), "quantised": quantised, "LoRA": adapted}[kind]()
    prompt = random_prompt(TINY, batch=2, length=24)  # with another one a replica, which has no plan, rounds otherwise
    expected = logits(model, prompt)
    assert torch.equal(logits(replicated(model, monkeypatch), prompt), expected)


def test_a_bias_that_is_gathered_later_is_the_modules_own_affair() -> None:
    """ZeRO-3: empty until the module's own hooks have run, and empty again afterwards."""
    linear = nn.Linear(8, 4).half()
    whole, hidden = linear.bias.data, torch.randn(2, 8).half()
    expected = linear(hidden)
    linear.bias.data = torch.empty(0).half()
    linear.register_forward_pre_hook(lambda *_: setattr(linear.bias, "data", whole))
    linear.register_forward_hook(lambda *_: setattr(linear.bias, "data", torch.empty(0).half()))
    assert torch.equal(linears.project_exactly(linear, hidden), expected)
    assert not linear.bias.numel()


def test_tensor_parallel_projections_are_rounded_as_in_stock_and_fully_sharded_ones_are_exact() -> None:
    """The former's hooks bring shards and take them away: what they see has its bias. The latter's are the layer's."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallel, sharded = half(), qwen2_fp16_fix.fix(half())
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for attention in attentions(parallel):
            parallelize_module(attention, mesh, {"q_proj": ColwiseParallel(), "k_proj": ColwiseParallel()})
        assert type(k_proj_of(parallel).weight) is torch.distributed.tensor.DTensor
        qwen2_fp16_fix.fix(parallel)
        assert states(parallel) == ROUNDED
        assert error(parallel) < 1.1 * stock_error()
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        assert error(sharded) < CLOSE
    finally:
        torch.distributed.destroy_process_group()
