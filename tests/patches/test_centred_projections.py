"""Projections whose keys are centred: with autograd, hooks and adapters, offloaded, moved and unfixed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwen2_fp16_fix
from qwen2_fp16_fix.patches.attention_form import claim_keys
from qwen2_fp16_fix.patches.projections import rotated_projections
from tests.helpers import kl_to
from tests.patches.models import fixed, logits, states, tables
from tests.stress import TINY, build


def test_projections_are_the_same_to_the_bit_with_autograd() -> None:
    """Without it, heads are written where they are rotated."""
    attention = fixed("keys").model.layers[0].self_attn
    hidden = torch.randn(2, 5, TINY.hidden).half()
    cos, sin = (table.float() for table in tables(7, 8, 9, 10, 11))
    form = claim_keys(attention, hidden, None, marks_last=True)
    with torch.no_grad():
        expected = rotated_projections(attention, hidden, cos, sin, form)
    found = rotated_projections(attention, hidden, cos, sin, form)
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert other.requires_grad


@pytest.mark.parametrize("where", ["q_proj", "everywhere"])
def test_a_hook_is_called(where: str) -> None:
    """Heads are written past every hook: so only where there is none."""
    attention = fixed("keys").model.layers[0].self_attn
    cos, sin = (table.float() for table in tables(7, 8))
    called: list[nn.Module] = []
    register = nn.modules.module.register_module_forward_hook
    if where == "q_proj":
        register = attention.q_proj.register_forward_hook
    handle = register(lambda module, *_: called.append(module))
    with torch.no_grad():
        hidden = torch.randn(1, 2, TINY.hidden).half()
        rotated_projections(attention, hidden, cos, sin, claim_keys(attention, hidden, None, marks_last=True))
    handle.remove()
    assert attention.q_proj in called


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks transformers for it
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("first", ["fixed", "wrapped"])
def test_adapters_leave_the_bias_unrounded(first: str, dora: bool) -> None:
    """DoRA takes the bias of what it wraps off again, or finds none."""
    import peft

    def wrap(model: Any) -> Any:
        torch.manual_seed(0)
        chosen = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False, use_dora=dora)
        return peft.get_peft_model(model, chosen).eval()

    oracle = logits(wrap(build(TINY, ("keys",))))
    assert kl_to(oracle, logits(build(TINY, ("keys",)))) > 1e-2  # the adapter does something
    half = build(TINY, ("keys",)).half()
    model = wrap(qwen2_fp16_fix.fix(half)) if first == "fixed" else qwen2_fp16_fix.fix(wrap(half))
    assert states(model) == {"centred"}
    assert kl_to(oracle, logits(model)) < 4e-5  # DoRA's own norms are float16's
    assert kl_to(oracle, logits(wrap(build(TINY, ("keys",)).half()))) > 1e-3


class Opaque(nn.Module):
    """Stands for a quantised linear: has a bias, and adds it as it likes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def test_a_projection_that_rounds_its_bias_is_named_and_no_worse_than_stock() -> None:
    """What it rounds away is gone; the centre then costs nothing, but for chance."""
    stock, ours = 0.0, 0.0
    for seed in range(3):
        oracle = logits(build(TINY, ("keys",), seed=seed))
        model = build(TINY, ("keys",), seed=seed).half()
        stock += kl_to(oracle, logits(model))
        for layer in model.model.layers:
            layer.self_attn.k_proj = Opaque(layer.self_attn.k_proj)
        ours += kl_to(oracle, logits(qwen2_fp16_fix.fix(model)))
        assert states(model) == {"centred, bias rounded before"}
    assert ours < 1.02 * stock


def test_an_offloaded_bias_is_read_from_where_it_waits(tmp_path: Path) -> None:
    """On the meta device between calls, as device_map="auto" leaves what does not fit."""
    import accelerate

    model = build(TINY, ("keys",)).half()
    accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    assert model.model.layers[0].self_attn.k_proj.bias.is_meta
    qwen2_fp16_fix.fix(model)
    assert states(model) == {"centred"}
    assert kl_to(logits(build(TINY, ("keys",))), logits(model)) < 2e-5


def test_no_projection_changes_and_unfix_forgets_the_centre() -> None:
    model = build(TINY, ("keys",)).half()
    names = list(model.state_dict())
    qwen2_fp16_fix.fix(model)
    attention = model.model.layers[0].self_attn
    assert type(attention.k_proj) is type(attention.q_proj) is nn.Linear
    assert list(model.state_dict()) == names
    qwen2_fp16_fix.unfix(model)
    assert not {"centre", "ranges", "factor", "witnesses"} & vars(attention).keys()


def test_the_centre_follows_a_move_and_not_a_cast() -> None:
    attention = fixed("keys").bfloat16().model.layers[0].self_attn
    assert attention.key_shift.dtype == torch.float32
    assert attention.to("meta").key_shift is None
