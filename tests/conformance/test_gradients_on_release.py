"""Gradients: a float16 step learns what an fp32 one learns, planned and by token, with adapters and without."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwen2_fp16_fix
from tests.conformance.models import ATTENTIONS, PROMPT, SDPA_SCORES_ARE_FP32
from tests.stress import TINY, build

#: An ordinary model, two with exponents, and one whose keys lose in stock what they say. Not "scores": its bias of keys
#: says the same to every token, so its gradient is 0 but for rounding, in fp32 as well.
STRESSES = ((), ("residual",), ("swiglu",), ("keys",))
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: The loss is multiplied by it: float16 has no gradient below 2^-24. What comes back to a layer with an exponent of e
#: is multiplied by 2^e before it is rounded, so stressed models bear less than the 2^16 that trainers start at:
#: "residual" with adapters overflows at 2^8.
SCALE = 2.0**6

#: Of a parameter's gradient, relative to its length. It makes the cosine at least 0.9999, and sees a wrong length too.
#: Roundings to 11 bits through 4 layers come to 1e-3 here, 4e-3 for a bias of keys, most of which cancels.
CLOSE = 1e-2

#: With autocast on a CPU before torch 2.5, whose sdpa then takes its scores in float16: 1.3e-2 in a bias of keys.
CLOSE_UNDER_AUTOCAST = CLOSE if SDPA_SCORES_ARE_FP32 else 2 * CLOSE

#: What our error may be of stock's. With adapters on a massive channel one rounding decides for either: over 8 seeds it
#: is between 0.4 and 2.2 times, without adapters 0.9 to 1.06.
CHANCE = 3.0

RATE = 1e-2  # of the steps between

Gradients = dict[str, Tensor]


class Adapter(nn.Module):
    """Stands for PEFT's LoRA, which the matrix does not install: fp32 weights beside a frozen linear of any dtype."""

    __module__ = "peft.tuners.lora.layer"  # an adapter of unknown origin may change the bias, and ends the centre
    merged = disable_adapters = False

    def __init__(self, base_layer: nn.Linear, bias: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        generator = torch.Generator().manual_seed(base_layer.in_features + base_layer.out_features)
        self.lora_A = nn.Linear(base_layer.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base_layer.out_features, bias=bias)
        for parameter in (*self.lora_A.parameters(), *self.lora_B.parameters()):
            parameter.data.normal_(std=0.02, generator=generator)

    def get_base_layer(self) -> nn.Module:
        """The linear, under the name that PEFT has for it."""
        return self.base_layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT: what is wrapped is handed all arguments, and what comes back keeps its dtype."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        return (result + self.lora_B(self.lora_A(x.float()))).to(result.dtype)


def adapted(model: Any, *targets: str, bias: bool = False) -> Any:
    """The model, frozen, with adapters on the linears of these names."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name in targets:
                if hasattr(owner, name):
                    setattr(owner, name, Adapter(getattr(owner, name), bias))
    return model


def times_scale(loss: Tensor) -> Tensor:
    return loss * SCALE


def backward(model: Any, scaled: Callable[[Tensor], Tensor] = times_scale, autocast: bool = False) -> None:
    """Leaves the gradients of the scaled loss on the model's parameters, and no others."""
    model.train().zero_grad()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        loss = model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss
    scaled(loss.float()).backward()


def gradients(model: Any, scale: float = SCALE) -> Gradients:
    """The gradients that the parameters hold, in fp32, of the loss itself."""
    return {name: p.grad.float() / scale for name, p in model.named_parameters() if p.grad is not None}


def error(oracle: Gradients, found: Gradients) -> float:
    """Of all gradients together, relative to their length."""
    squares = [((oracle[name] - found[name]).square().sum(), oracle[name].square().sum()) for name in oracle]
    return float((sum(off for off, _ in squares) / sum(length for _, length in squares)) ** 0.5)


def check(oracle: Gradients, found: Gradients, stock: Gradients | None = None, close: float = CLOSE) -> None:
    """Each parameter's gradient is finite, as fp32's, and all together are no farther from it than stock's."""
    assert oracle.keys() == found.keys()
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    off = {name: error({name: oracle[name]}, found) for name in oracle}  # 1 for a gradient that is all zero
    assert not {name: value for name, value in off.items() if not value < close}
    if stock is not None and all(torch.isfinite(gradient).all() for gradient in stock.values()):
        assert error(oracle, found) < CHANCE * error(oracle, stock)


def exact(model: Any, like: Any) -> Gradients:
    """Gradients of a stock fp32 `model` with the weights of another one, `like`, of any dtype."""
    model.load_state_dict({name: weight.float() for name, weight in like.state_dict().items()})
    backward(model)
    return gradients(model)


def exponents(model: Any) -> list[int | None]:
    return [part.exponent for layer in model.model.layers for part in (layer.mlp, layer.self_attn)]


@functools.cache
def stressed(kinds: tuple[str, ...], attention: str) -> Any:
    return build(replace(TINY, layers=3), kinds, attn_implementation=attention)


def stock_model(kinds: tuple[str, ...], attention: str) -> Any:
    """A stock fp32 model of its own."""
    return copy.deepcopy(stressed(kinds, attention))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kinds", STRESSES, ids=lambda kinds: "+".join(kinds) or "ordinary")
def test_full_training_in_float16(kinds: tuple[str, ...], attention: str) -> None:
    """The first step has a plan, which it ends: torch's ldexp then stopped every gradient from 2.11 on."""
    stock = stock_model(kinds, attention).half()
    model = qwen2_fp16_fix.fix(copy.deepcopy(stock))
    assert None not in exponents(model)
    assert (max(exponents(model)) > 0) == (kinds in (("residual",), ("swiglu",)))
    for step in (1, 2):
        stock.load_state_dict(model.state_dict())
        oracle = exact(stock_model(kinds, attention), like=model)
        backward(stock)
        backward(model)
        check(oracle, gradients(model), gradients(stock))
        assert (None in exponents(model)) == (step == 2)
        torch.optim.SGD(model.parameters(), lr=RATE / SCALE).step()


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kinds", STRESSES, ids=lambda kinds: "+".join(kinds) or "ordinary")
def test_training_under_autocast(kinds: tuple[str, ...], attention: str, adapters: bool) -> None:
    """As Trainer(fp16=True) trains fp32 weights on a GPU, with its scaler; on a CPU that switch does nothing."""

    def prepared() -> Any:
        model = stock_model(kinds, attention)
        return adapted(model, *TARGETS) if adapters else model

    stock, model = prepared(), qwen2_fp16_fix.fix(prepared())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in (1, 2):
        stock.load_state_dict(model.state_dict())
        oracle = exact(prepared(), like=model)
        backward(stock, autocast=True)
        backward(model, scaler.scale, autocast=True)
        scaler.unscale_(optimizer)
        check(oracle, gradients(model, scale=1.0), gradients(stock), CLOSE_UNDER_AUTOCAST)
        assert (None in exponents(model)) == (adapters or step == 2)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == SCALE  # no step was skipped


@pytest.mark.parametrize("target", [*TARGETS, "all", "o_proj with a bias", "down_proj with a bias"])
def test_adapters_on_float16(target: str) -> None:
    """A layer that holds one scales by token, and so do the gradients that go on to the layers below it."""
    kinds = ("swiglu",)
    targets = TARGETS if target == "all" else (target.partition(" ")[0],)

    def prepared(model: Any) -> Any:
        return adapted(model, *targets, bias="bias" in target)

    model = qwen2_fp16_fix.fix(prepared(stock_model(kinds, "sdpa").half()))
    assert set(exponents(model)) == {None}
    for _ in range(2 if target == "all" else 1):
        oracle = exact(prepared(stock_model(kinds, "sdpa")), like=model)
        backward(model)
        check(oracle, gradients(model))
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE / SCALE).step()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # its new name is 5.23's alone
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float16", "autocast"])
def test_gradient_checkpointing_changes_no_gradient(autocast: bool, adapters: bool, reentrant: bool) -> None:
    """What is computed again has to take the same way, exponents included."""

    def trained(checkpointing: bool) -> Gradients:
        model = stock_model(("swiglu",), "sdpa")
        model = model if autocast else model.half()
        model = qwen2_fp16_fix.fix(adapted(model, *TARGETS) if adapters else model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        backward(model, autocast=autocast)
        return gradients(model)

    expected, found = trained(checkpointing=False), trained(checkpointing=True)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
