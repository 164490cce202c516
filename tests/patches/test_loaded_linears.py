"""Linears as loaders and wrappers find them, and what `status` says of weights that loading made up."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwen2_fp16_fix
from tests.helpers import kl_to
from tests.patches.models import EXACT, ROUNDED, attentions, half, logits, quantised, states, stock_error
from tests.stress import TINY, build


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
    assert "layers.1.self_attn.k_proj is a plain linear with int8 weights" in found.problem
    assert qwen2_fp16_fix.status(quantised()).model.fixed
