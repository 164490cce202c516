"""Loaders of quantised checkpoints: they ask which class a linear is while the model is built, and put others there."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.qwen2 import modeling_qwen2

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import linears
from tests.conformance.models import ATTENTIONS, DTYPE, fixed_half, kl, logits, stress
from tests.helpers import Quantised
from tests.stress import TINY

#: KL to fp32, nats. Exact biases beside spikes of 300 are at 3e-7, rounded ones at 1e-3.
EXACT, ROUNDED = 2e-5, 1e-2


def asks_for_the_type(model: nn.Module) -> list[str]:
    """Replaces as transformers' integrations, optimum's GPTQ and fine-grained FP8 do: `type(module) is nn.Linear`."""
    found = [name for name, module in model.named_modules() if type(module) is nn.Linear and "lm_head" not in name]
    for name in found:
        owner, _, last = name.rpartition(".")
        if last in ("q_proj", "k_proj"):
            setattr(model.get_submodule(owner), last, Quantised.of(model.get_submodule(name)))
    return found


def keys(model: Any) -> set[str]:
    return {row.keys for row in qwen2_fp16_fix.status(model).model.ranges}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stress(("keys",)).half().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_loader_finds_every_linear_and_its_biases_stay_exact(
    folder: Path, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it asks before the weights are loaded or after; q_proj and k_proj were skipped, in silence."""
    asked: list[set[type]] = []
    built = modeling_qwen2.Qwen2Model.__init__

    def look(self: Any, *args: Any, **kwargs: Any) -> None:
        built(self, *args, **kwargs)
        asked.append({type(module) for name, module in self.named_modules() if name.endswith("_proj")})

    qwen2_fp16_fix.register()
    monkeypatch.setattr(modeling_qwen2.Qwen2Model, "__init__", look)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, **{DTYPE: torch.float16}
    )
    assert asked
    assert all(kinds == {nn.Linear} for kinds in asked)
    assert len(asks_for_the_type(model)) == 7 * TINY.layers
    assert keys(model) == {"centred"}
    reference = stress(("keys",))
    for layer, other in zip(reference.model.layers, model.model.layers, strict=True):
        for name in ("q_proj", "k_proj"):
            getattr(layer.self_attn, name).weight.data = getattr(other.self_attn, name).dequantised(torch.float32)
    assert kl(logits(reference), logits(model)) < EXACT


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_hook_and_a_wrapped_forward_see_stocks_output(attention: str) -> None:
    """With the original signature, as compressed-tensors' wrapper has it; and then the bias is rounded, and said so."""
    oracle, model = logits(stress(("keys",))), fixed_half(("keys",), attention)
    assert kl(oracle, logits(model)) < EXACT
    seen, calls = [], []

    def strict(self: nn.Linear, input: Tensor) -> Tensor:
        calls.append(self)
        return nn.functional.linear(input, self.weight, self.bias)

    k_proj = model.model.layers[0].self_attn.k_proj
    handle = k_proj.register_forward_hook(lambda module, inputs, output: seen.append((module, *inputs, output)))
    assert kl(oracle, logits(model)) < ROUNDED
    handle.remove()
    module, hidden, output = seen[0]
    assert module is k_proj
    assert torch.equal(output, k_proj(hidden))
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.forward = strict.__get__(projection)
    assert kl(oracle, logits(model)) < ROUNDED
    assert len(calls) == 2 * TINY.layers
    assert keys(model) == {"centred, bias rounded before"}
    assert torch.equal(linears.project_exactly(k_proj, hidden), output)


def test_status_knows_what_loading_made_up(folder: Path) -> None:
    """A checkpoint whose quantised names no module has: finite, fluent and random."""
    file = next(iter(folder.glob("*.safetensors")), None)
    assert file is not None, "this release saves safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors["model.layers.1.self_attn.k_proj.qweight"] = tensors.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    qwen2_fp16_fix.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = qwen2_fp16_fix.status(model).model
    assert not found.fixed
    assert "layers.1.self_attn.k_proj.weight was not in the checkpoint" in found.problem
    base = qwen2_fp16_fix.status(transformers.AutoModel.from_pretrained(folder)).model
    assert base.problem == found.problem
