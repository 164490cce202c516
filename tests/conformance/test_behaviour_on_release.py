"""Generation, outputs, checkpointing: a fixed model behaves as transformers' own in everything but its numbers."""

from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers.models.qwen2 import modeling_qwen2

import qwen2_fp16_fix
from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import STOCK
from tests.conformance.models import ATTENTIONS, CLOSE, PROMPT, RELEASE, fixed_half, generate, kl, logits, stress
from tests.stress import TINY

pytestmark = pytest.mark.usefixtures("arithmetic")

#: For tests in which a fixed model runs stock's code, or that are not about what it computes.
in_one_arithmetic = pytest.mark.parametrize("arithmetic", ["cpu"], indirect=True)


STRESS = ("scores", "residual")
CACHES: tuple[dict[str, Any], ...] = ({},) if RELEASE < Version("4.45") else ({}, {"cache_implementation": "static"})


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_greedy_generation_says_what_fp32_says(attention: str, cache: dict[str, Any]) -> None:
    """`!!!!!!!!` is the greedy choice among NaN logits."""
    expected = generate(stress(STRESS, attention))
    assert (expected != 0).any()
    assert torch.equal(generate(fixed_half(STRESS, attention), **cache), expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_beam_search_says_what_fp32_says(attention: str) -> None:
    """Beams reorder the cache."""
    expected = generate(stress(STRESS, attention), num_beams=3)
    assert torch.equal(generate(fixed_half(STRESS, attention), num_beams=3), expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_sampling_draws_from_finite_probabilities(attention: str) -> None:
    """Stock raises `probability tensor contains either inf, nan or element < 0`, or draws id 0."""
    drawn = generate(fixed_half(STRESS, attention), do_sample=True, top_k=0)
    assert len(drawn.unique()) > 2


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_hidden_states_are_all_there(attention: str) -> None:
    with torch.no_grad():
        found = fixed_half(STRESS, attention)(input_ids=PROMPT, output_hidden_states=True).hidden_states
        expected = stress(STRESS, attention)(input_ids=PROMPT, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == TINY.layers + 1
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        # relative to each token's length: 11 bits of mantissa, accumulated over the layers
        assert ((a.float() - b).norm(dim=-1) / b.norm(dim=-1)).max() < 2e-2


@in_one_arithmetic
def test_the_residual_stream_is_fp32() -> None:
    """Between the layers it holds what float16 cannot; after the final norm it is in the weights' dtype again."""
    with torch.no_grad():
        found = fixed_half(STRESS)(input_ids=PROMPT, output_hidden_states=True).hidden_states
    assert max(float(h.abs().max()) for h in found) > torch.finfo(torch.float16).max
    assert found[-1].dtype == torch.float16


# From 4.53 sdpa gives no weights when asked; before, it hands over to eager.
@pytest.mark.parametrize("attention", ("eager", "sdpa") if RELEASE < Version("4.53") else ("eager",))
def test_attentions_are_intact(attention: str) -> None:
    """Interpretability needs them; a fused class must hand over to the fixed eager one, not to stock's."""
    with torch.no_grad():
        found = fixed_half(STRESS, attention)(input_ids=PROMPT, output_attentions=True)
        expected = stress(STRESS, attention)(input_ids=PROMPT, output_attentions=True)
    assert kl(expected.logits, found.logits.float()) < CLOSE
    assert len(found.attentions) == TINY.layers
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        assert (a.shape, a.dtype) == (b.shape, torch.float16)
        torch.testing.assert_close(a.float().sum(-1), torch.ones(a.shape[:-1]), atol=4e-3, rtol=0)  # 24 roundings
        torch.testing.assert_close(a.float(), b, atol=2e-2, rtol=0)  # keys of 302 have a float16 step of 0.25


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # its new name is 5.23's alone
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@in_one_arithmetic
def test_gradient_checkpointing_recomputes(reentrant: bool) -> None:
    """An assigned forward loses it silently from 5.23: memory grows and nobody is told."""
    plain, expected = _gradient(checkpointing=None)
    assert plain == TINY.layers
    calls, found = _gradient(checkpointing=reentrant)
    assert calls == 2 * TINY.layers
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected)


def _gradient(checkpointing: bool | None) -> tuple[int, torch.Tensor]:
    """How often attention ran in a forward and backward pass, and the gradient of one projection."""
    model = fixed_half(STRESS).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(count)
    loss = model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss
    loss.backward()
    assert torch.isfinite(loss)
    return calls, model.model.layers[1].mlp.up_proj.weight.grad.clone()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # its new name is 5.23's alone
@in_one_arithmetic
def test_fp32_gradients_are_bit_identical_to_stock() -> None:
    """With checkpointing too: the recomputed pass must take the stock path again."""

    def gradients(model: Any, checkpointing: bool) -> list[torch.Tensor]:
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(stress(), checkpointing=False)
    for checkpointing in (False, True):
        found = gradients(qwen2_fp16_fix.fix(stress()), checkpointing)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@in_one_arithmetic
def test_parts_are_what_transformers_records_and_splits() -> None:
    """Recording matches isinstance of the stock classes; device maps and FSDP match their names."""
    model = fixed_half()
    for layer in model.model.layers:
        assert isinstance(layer, STOCK.Qwen2DecoderLayer)
        assert isinstance(layer.self_attn, STOCK.Qwen2Attention)
        assert type(layer).__name__ == "Qwen2DecoderLayer"
    assert set(model._no_split_modules) == {"Qwen2DecoderLayer"}


@pytest.mark.parametrize("attention", ATTENTIONS)
@in_one_arithmetic
def test_unfix_restores_bit_for_bit(attention: str) -> None:
    """Also where outputs were recorded before: 4.54 to 5.1 then leave a forward of the old class behind."""
    model = stress((), attention).half()
    with torch.no_grad():
        before = model(input_ids=PROMPT, output_hidden_states=True).logits
        qwen2_fp16_fix.fix(model)
        model(input_ids=PROMPT, output_hidden_states=True)
        assert not torch.equal(before, model(input_ids=PROMPT).logits)
        qwen2_fp16_fix.unfix(model)
        assert torch.equal(before, model(input_ids=PROMPT).logits)
    assert all(not type(module).__module__.startswith("qwen2_fp16_fix") for module in model.modules())


@in_one_arithmetic
def test_a_fused_step_ends_every_plan() -> None:
    """Fused optimisers leave no trace on the weights: the exponents of the old ones would overflow on the new ones."""
    model = qwen2_fp16_fix.fix(stress())
    step = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    step.step()
    model.zero_grad()
    with torch.no_grad():
        model(input_ids=PROMPT, use_cache=False)
    assert [layer.plan for layer in model.model.layers] == [None] * TINY.layers
    model.eval()
    assert torch.isfinite(logits(model)).all()
    assert all(layer.plan is not None for layer in model.model.layers)
    assert qwen2_fp16_fix.status(model).model.fixed


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@in_one_arithmetic
def test_a_model_built_on_the_meta_device_runs_once_it_has_weights(dtype: torch.dtype) -> None:
    """No checkpoint holds its frequencies: stock has none then, and raises."""
    source = stress(STRESS)
    with torch.device("meta"):
        model = qwen2_fp16_fix.Qwen2ForCausalLM(source.config).to(dtype).eval()
    model.load_state_dict({name: weight.to(dtype) for name, weight in source.state_dict().items()}, assign=True)
    assert kl(logits(source), logits(model)) < CLOSE
    found = qwen2_fp16_fix.status(model).model
    assert found.fixed
    assert all(row.mlp != "by token" and row.keys == "centred" for row in found.ranges)


@pytest.mark.parametrize("name", ["norm", "MLP", "rotation"])
@in_one_arithmetic
def test_code_replaced_after_the_fix_is_told_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As attribution tools replace it: a fixed model does not run it, so what they compute is wrong."""
    model = fixed_half(STRESS)
    logits(model)
    owner, place = {
        "norm": (STOCK.Qwen2RMSNorm, "forward"),
        "MLP": (STOCK.Qwen2MLP, "forward"),
        "rotation": (modeling_qwen2, "apply_rotary_pos_emb"),
    }[name]
    monkeypatch.setattr(owner, place, lambda *args, **kwargs: None)
    with pytest.warns(qwen2_fp16_fix.PatchConflictWarning, match=place):
        logits(model)
    assert "replaced" in qwen2_fp16_fix.status(model).model.problem
