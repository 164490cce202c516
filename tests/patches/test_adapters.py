"""Projections in an adapter or quantised: exact biases, real gradients, compiled, copied and shared by threads."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import linears
from tests.helpers import kl_to
from tests.patches.models import (
    EXACT,
    ROUNDED,
    SIZES,
    UNCENTRED,
    adapted,
    attentions,
    half,
    logits,
    quantised,
    states,
    stock_error,
)
from tests.stress import TINY, build

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks transformers

NEWER = ("Beft", "Deft", "Delora", "Frod", "Gralora", "Hira", "Lily", "OSF", "Peanut", "Psoft", "Pvera", "RandLora",
         "Supertuning", "TinyLora", "UniLora")  # fmt: skip
CHANGING = ("IA3", "Road", "Glora")  # the bias, too


def of_peft(*kinds: str) -> list[str]:
    """Those that the installed PEFT has."""
    import peft

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


@pytest.mark.parametrize(("kind", "attention"), [*((kind, "eager") for kind in KINDS), ("LoRA", "sdpa")])
def test_a_whole_graph_is_compiled(kind: str, attention: str) -> None:
    """Without a view made beforehand, too: Dynamo cannot make a class."""
    model = KINDS[kind]()
    model.config._attn_implementation = attention
    model.config.num_hidden_layers = 2  # to compile all four takes twice as long
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
