"""Scaling by token, backwards: what passes through it, what it keeps for that, and training with PEFT itself."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import numerics, scaling
from tests.stress import TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=2, length=24)
SCALE = 2.0**6  # of the loss: float16 has no gradient below 2^-24
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(params=["cpu", "elsewhere"])
def arithmetic(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of a CPU, and the one that any other device gets."""
    if request.param == "elsewhere":
        monkeypatch.setattr(sys.modules[numerics.__name__], "runs_on_cpu", lambda tensor: False)


def off(exact: Tensor, found: Tensor) -> float:
    """‖exact - found‖ / ‖exact‖: 1 for a gradient that is all zero, infinite for one that is not finite."""
    assert exact.shape == found.shape
    return float((exact - found).norm() / exact.norm()) if torch.isfinite(found).all() else math.inf


@pytest.mark.parametrize("default", [torch.float16, torch.float32, torch.float64], ids=str)
def test_powers_of_two_are_exact(default: torch.dtype) -> None:
    """All that fp32 has, down to its smallest number, whatever torch makes where it is not told a dtype."""
    exponents = torch.arange(-149, 128, dtype=torch.int32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = scaling.power_of_two(exponents)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert found.tolist() == [2.0**exponent for exponent in exponents.tolist()]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1000.0])
def test_every_gradient_passes_by_token(size: float, bias: bool) -> None:
    """torch.ldexp by integers has a gradient of 0 for negative ones, from 2.11 on: nothing came through above 1.

    A bias is in the output twice, scaled back and as it is, and its gradient must not be a difference of the two.
    """
    linear = nn.Linear(256, 128, bias=bias)
    activation, wanted = torch.randn(2, 24, 256) * size, torch.randn(2, 24, 128) / 8
    linear.load_state_dict({name: weight.half() for name, weight in linear.state_dict().items()})

    def gradients(linear: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        linear.zero_grad()
        handed = activation.clone().requires_grad_()
        run(handed).backward(wanted)
        return [handed.grad, *(parameter.grad.float() for parameter in linear.parameters())]  # type: ignore[union-attr,list-item]

    exact = gradients(linear, linear)
    linear.half()
    found = gradients(linear, lambda handed: scaling.linear_by_token(linear, handed, 256))
    assert max(map(off, exact, found)) < 4e-3  # three roundings of 2^-11, on the way to each


def test_scaling_by_token_keeps_for_backward_what_the_matmul_does() -> None:
    """Nothing of the size of the activation beside it: what scales it is one number a token."""
    linear, kept = nn.Linear(512, 64, bias=False).half(), {}
    activation = torch.randn(2, 24, 512).mul(100).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = scaling.linear_by_token(linear, activation, 512)
    assert output.requires_grad
    tokens = 2 * 24
    assert sum(kept.values()) <= 2 * linear.weight.numel() + 2 * activation.numel() + 2 * 4 * tokens


def gradients(model: Any) -> dict[str, Tensor]:
    """Of the loss, by the names of the parameters that have one."""
    loss = model.train()(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss
    (loss.float() * SCALE).backward()
    return {name: p.grad.float() / SCALE for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks transformers for it
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")  # no Qwen2 has a bias there, and it can be learned
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("target", [*TARGETS, "all", "o_proj with a bias", "down_proj with a bias"])
def test_lora_learns_what_it_learns_in_fp32(target: str, attention: str) -> None:
    """Every adapter makes its layer scale by token; the loss rose from there, without a word."""
    import peft

    targets = list(TARGETS) if target == "all" else [target.partition(" ")[0]]
    settings = {"lora_bias": True} if "bias" in target else {}

    def wrapped(model: Any) -> Any:
        torch.manual_seed(0)
        chosen = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
        return peft.get_peft_model(model, chosen)

    exact = gradients(wrapped(build(TINY, ("swiglu",), attn_implementation=attention)))
    model = qwen2_fp16_fix.fix(wrapped(build(TINY, ("swiglu",), attn_implementation=attention).half()))
    found = gradients(model)
    assert exact.keys() == found.keys()
    worst = {name: off(exact[name], found[name]) for name in exact}
    assert max(worst.values()) < 3e-2  # a cosine of 0.9995; six sets of random adapters are at 5e-3 to 2.1e-2
