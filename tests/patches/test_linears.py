"""Projections that are not plain: watched, wrapped, quantised, elsewhere. The product alone, or all as in stock."""

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.parallel.replicate
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import linears
from tests.helpers import kl_to, replicated
from tests.stress import TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=2, length=24)
EXACT, ROUNDED, UNCENTRED = {"centred"}, {"centred, bias rounded before"}, {"not centred"}
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks transformers


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=PROMPT, use_cache=False).logits.float()
    return found


def half() -> Any:
    return build(TINY, ("keys",)).half()


def attentions(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "k_proj")]


def states(model: Any) -> set[str]:
    return {row.keys for row in qwen2_fp16_fix.status(model).model.ranges}


@functools.cache
def oracle() -> Tensor:
    return logits(build(TINY, ("keys",)))


def error(model: Any) -> float:
    found = logits(model)
    assert torch.isfinite(found).all()
    return kl_to(oracle(), found)


@functools.cache
def stock_error() -> float:
    return error(half())


def replace(model: Any, make: Callable[[nn.Module], nn.Module]) -> Any:
    """The model with other query and key projections."""
    for attention in attentions(model):
        attention.q_proj, attention.k_proj = make(attention.q_proj), make(attention.k_proj)
    return model


#: KL to fp32 of these weights, nats. Exact biases are at 3e-7, rounded ones at 1e-3 as stock.
CLOSE = 5e-6


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
def test_to_look_changes_nothing(kind: str) -> None:
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
    accelerate = pytest.importorskip("accelerate")
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
    accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
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


class Quantised(nn.Linear):
    """Stands for a quantised linear: int8 weights, rows with a scale each, the bias added last, if there is one."""

    __module__ = "bitsandbytes.nn.stands_for"

    @classmethod
    def of(cls, linear: Any) -> Any:
        made = cls(linear.in_features, linear.out_features, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True).float() / 127
        made.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        made.bias = linear.bias
        made.register_buffer("scale", scale)
        return made

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return (self.weight * self.scale).to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]  # nn.Linear calls it input
        product = nn.functional.linear(hidden, self.dequantised(hidden.dtype))
        return product if self.bias is None else product + self.bias


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


def quantised(first: str = "quantised", kind: type[Quantised] = Quantised) -> Any:
    model = half() if first == "quantised" else qwen2_fp16_fix.fix(half())
    replace(model, kind.of)
    return qwen2_fp16_fix.fix(model) if first == "quantised" else model


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
    expected = logits(model)
    assert torch.equal(logits(replicated(model, monkeypatch)), expected)


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


# --- adapters ---


def wrap(model: Any, kind: str) -> Any:
    peft = pytest.importorskip("peft")
    chosen = getattr(peft, f"{kind}Config")(target_modules=["q_proj", "k_proj"], **SIZES.get(kind, {}))
    return peft.get_peft_model(model, chosen).eval()


@functools.cache
def learned(kind: str) -> dict[str, Tensor]:
    """An adapter that does something, made once: float16 and fp32 draw other random numbers."""
    torch.manual_seed(0)
    model = wrap(build(TINY, ("keys",)), kind)
    base = {name for name, _ in model.named_parameters() if "base_layer" in name}
    found = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return {name: value + torch.randn(value.shape) * 0.02 for name, value in found.items() if name not in base}


def adapted(model: Any = None, kind: str = "Lora") -> Any:
    """A model, by default a fixed one, in that adapter."""
    torch.manual_seed(0)
    model = wrap(qwen2_fp16_fix.fix(half()) if model is None else model, kind)
    with torch.no_grad():
        for name, value in learned(kind).items():
            model.get_parameter(name).copy_(value)
    return model


SIZES: dict[str, dict[str, Any]] = {
    "Lora": {"r": 2},
    "LoHa": {"r": 2},
    "LoKr": {"r": 2},
    "AdaLora": {"total_step": 10, "init_r": 2, "target_r": 1},
    "BOFT": {"boft_block_size": 4, "boft_n_butterfly_factor": 1},
    "C3A": {"block_size": 8},
    "FourierFT": {"n_frequency": 20},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "Miss": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "Road": {"group_size": 16},
    "Shira": {"r": 2},
    "VBLoRA": {"num_vectors": 8, "vector_length": 8},
    "Vera": {"r": 8},
    "WaveFT": {"n_frequency": 20},
}
NEWER = ("Beft", "Deft", "Delora", "Frod", "Gralora", "Hira", "Lily", "OSF", "Peanut", "Psoft", "Pvera", "RandLora",
         "Supertuning", "TinyLora", "UniLora")  # fmt: skip
CHANGING = ("IA3", "Road", "Glora")  # the bias, too


def of_peft(*kinds: str) -> list[str]:
    """Those that the installed PEFT has."""
    peft = pytest.importorskip("peft")
    return [kind for kind in kinds if hasattr(peft, f"{kind}Config")]


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly")
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", of_peft(*[kind for kind in SIZES if kind not in CHANGING], *NEWER))
def test_an_adapter_that_adds_to_a_product_leaves_the_bias_out(kind: str) -> None:
    """In fp64, where nothing hides in rounding: a view and the bias are what the adapter returns."""
    model = adapted(build(TINY, ("keys",)), kind).double()
    hidden = torch.randn(2, 3, TINY.hidden, dtype=torch.float64)
    for attention in attentions(model):
        for projection in (attention.q_proj, attention.k_proj):
            with torch.no_grad():
                whole, base = projection(hidden), projection.get_base_layer()
                assert (whole - base(hidden)).abs().max() > 1e-4
                assert linears.is_viewable(projection)
                found = linears.view_of(projection)(hidden) + base.bias
            assert (found - whole).abs().max() < 1e-6 * whole.abs().max()  # some compute in fp32


@pytest.mark.parametrize("first", ["fixed", "wrapped"])
@pytest.mark.parametrize("kind", of_peft(*CHANGING))
def test_an_adapter_that_changes_the_bias_gets_no_centre_and_is_no_worse_than_stock(kind: str, first: str) -> None:
    """The centre is that of the bias beneath it, which a key can be farther from than from 0."""
    exact = logits(adapted(build(TINY, ("keys",)), kind))
    model = adapted(None, kind) if first == "fixed" else qwen2_fp16_fix.fix(adapted(half(), kind))
    assert states(model) == UNCENTRED
    assert kl_to(exact, logits(model)) < 1.1 * kl_to(exact, logits(adapted(half(), kind)))  # chance; centred 2 times
    if kind != "Glora":  # which cannot be merged
        model = qwen2_fp16_fix.fix(model.merge_and_unload())
        assert states(model) == EXACT


@pytest.mark.parametrize("kind", of_peft("Lora", "LoHa", "OFT", "Vera"))
def test_adapters_are_exact_on_merged_and_off(kind: str) -> None:
    """Also the call in which it takes itself out of the weights again."""
    reference, model = adapted(build(TINY, ("keys",)), kind), adapted(None, kind)

    def check(what: str, limit: float = 2e-5) -> None:
        assert kl_to(logits(reference), logits(model)) < limit, what
        assert states(model) == EXACT, what

    check("on")
    with model.disable_adapter(), reference.disable_adapter():
        check("off")
    model.merge_adapter()
    check("merged", 1e-4)  # into float16 weights
    with model.disable_adapter(), reference.disable_adapter():
        assert states(model) == ROUNDED
        assert kl_to(logits(reference), logits(model)) < 2 * stock_error()  # this call takes it out
        check("off, unmerged by that", 1e-4)
    check("on again", 1e-4)


def test_a_state_dict_and_an_adapter_file_are_stocks(tmp_path: Any) -> None:
    saved = {}
    for name, base in (("ours", qwen2_fp16_fix.fix(half())), ("stock", half())):
        model = adapted(base)
        logits(model)
        model.save_pretrained(tmp_path / name)
        saved[name] = (model.state_dict(), (tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert list(saved["ours"][0]) == list(saved["stock"][0])
    assert all(torch.equal(saved["ours"][0][key], saved["stock"][0][key]) for key in saved["stock"][0])
    assert saved["ours"][1] == saved["stock"][1]


# --- what else goes through a view ---

KINDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: qwen2_fp16_fix.fix(half()),
    "LoRA": lambda: adapted(),
    "quantised": lambda: quantised(),
    "LoRA over quantised": lambda: adapted(quantised()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_real_parameters(kind: str) -> None:
    """Weights, biases and adapters: in the direction of fp32's."""

    def gradients(model: Any) -> dict[str, Tensor]:
        model.train().zero_grad()
        for attention in attentions(model):
            attention.requires_grad_(False)
            for name, parameter in [*attention.q_proj.named_parameters(), *attention.k_proj.named_parameters()]:
                parameter.requires_grad_(parameter.is_floating_point() and (kind == "plain" or "base" not in name))
        hidden = torch.randn(2, 5, TINY.hidden, generator=torch.Generator().manual_seed(3))
        attention = attentions(model)[0]
        projected = linears.project_exactly(attention.k_proj, hidden.to(attention.k_proj.bias.dtype))
        (projected.float() * torch.linspace(-1, 1, projected.shape[-1])).sum().backward()
        return {n: p.grad.float().flatten() for n, p in attention.k_proj.named_parameters() if p.grad is not None}

    found, expected = gradients(KINDS[kind]()), gradients(KINDS[kind]().float())
    assert found
    assert list(found) == list(expected)
    for name, gradient in found.items():
        assert torch.cosine_similarity(gradient, expected[name], dim=0) > 0.999, name  # 11 bits each


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_graph_is_compiled(kind: str, attention: str) -> None:
    """Without a view made beforehand, too: Dynamo cannot make a class."""
    model = KINDS[kind]()
    model.config._attn_implementation = attention
    expected = logits(model)
    torch._dynamo.reset()
    linears._views.clear()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert kl_to(expected, logits(compiled)) < 1e-6  # addcmul taken apart


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_after_a_forward(kind: str) -> None:
    """Nothing that a forward makes stays in the model."""
    model = KINDS[kind]()
    expected = logits(model)  # the first ends plans that are stale
    before = [sorted(vars(module)) for module in model.modules()]
    logits(model)
    assert [sorted(vars(module)) for module in model.modules()] == before
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    if "quantised" in kind:  # the stand-in's module is none
        return
    file = io.BytesIO()
    pickle.dump(model, file)
    file.seek(0)
    assert torch.equal(logits(pickle.load(file)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_model(kind: str) -> None:
    model = KINDS[kind]()
    expected, found = logits(model), []
    linears._views.clear()
    threads = [threading.Thread(target=lambda: found.append(logits(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(each, expected) for each in found)


# --- loaders ---


def test_every_linear_is_of_the_stock_class_at_any_time() -> None:
    """Loaders of bitsandbytes, GPTQ and fp8 ask `type(module) is nn.Linear`, and skip what is none without a word."""
    from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import Qwen2ForCausalLM

    def kinds(model: Any) -> set[type]:
        return {type(module) for name, module in model.named_modules() if name.endswith("_proj")}

    built = Qwen2ForCausalLM(build(TINY, ()).config)
    assert kinds(built) == {nn.Linear}
    model = qwen2_fp16_fix.fix(half())
    logits(model)
    assert kinds(model) == {nn.Linear}
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_wrapper_of_linears_forward_meets_the_original_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """compressed-tensors' takes no keyword of ours. It is called, too: it may bring the weights."""
    calls = []

    def strict(self: nn.Linear, input: Tensor) -> Tensor:
        calls.append(self.in_features)
        return nn.functional.linear(input, self.weight, self.bias)

    model = qwen2_fp16_fix.fix(half())
    expected = logits(model)
    with monkeypatch.context() as patched:
        patched.setattr(nn.Linear, "forward", strict)
        assert torch.equal(logits(model), expected)
        assert len(calls) == 7 * TINY.layers + 1
        assert states(model) == EXACT
    for attention in attentions(model):
        for projection in (attention.q_proj, attention.k_proj):
            projection.forward = strict.__get__(projection)
    calls.clear()
    assert kl_to(expected, logits(model)) < 2 * stock_error()
    assert len(calls) == 2 * TINY.layers
    assert states(model) == ROUNDED


# --- what status says of what was loaded ---


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


def test_status_knows_what_loading_made_up(tmp_path: Any) -> None:
    """A quantised checkpoint whose names no module has loads with random numbers, and generates finite nonsense."""
    import transformers
    from safetensors.torch import load_file, save_file

    half().save_pretrained(tmp_path)
    qwen2_fp16_fix.register()
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert qwen2_fp16_fix.status(whole).model.fixed
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    state = dict(tensors)
    tensors["model.layers.3.self_attn.k_proj.qweight"] = tensors.pop("model.layers.3.self_attn.k_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    model, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert list(told["missing_keys"]) == ["model.layers.3.self_attn.k_proj.weight"]
    found = qwen2_fp16_fix.status(model).model
    assert not found.fixed
    assert "layers.3.self_attn.k_proj.weight was not in the checkpoint" in found.problem
    assert qwen2_fp16_fix.status(copy.deepcopy(model)).model.problem == found.problem
    model.load_state_dict(state)
    assert qwen2_fp16_fix.status(model).model.fixed


def test_status_knows_weights_of_another_kind_than_their_linear() -> None:
    """LLM.int8 weights in a linear that a loader took for none of its own: the first forward raises."""
    model = qwen2_fp16_fix.fix(half())
    k_proj = attentions(model)[1].k_proj
    k_proj.weight = nn.Parameter(k_proj.weight.detach().to(torch.int8), requires_grad=False)
    found = qwen2_fp16_fix.status(model).model
    assert not found.fixed
    assert "layers.1.self_attn.k_proj is a plain linear with weights of int8" in found.problem
    assert qwen2_fp16_fix.status(quantised()).model.fixed
