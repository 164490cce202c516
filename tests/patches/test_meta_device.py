"""A fixed model that is built on the meta device is planned and centred once its weights come, whichever way they come.

No checkpoint holds the frequencies of the rotary embedding. Stock has none after such a load, and raises.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor

import qwen2_fp16_fix
from tests.patches.models import rotation_of
from tests.stress import TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=2, length=12)
KINDS = ("swiglu",)  # needs exponents
Weights = dict[str, Tensor]


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return qwen2_fp16_fix.Qwen2ForCausalLM(config).half()


def parameters_on_meta(config: Any) -> Any:
    with accelerate.init_empty_weights():
        return qwen2_fp16_fix.Qwen2ForCausalLM(config).half()


def stock_on_meta(config: Any) -> Any:
    with qwen2_fp16_fix.stock_models():
        return on_meta(config)


def assigned(model: Any, weights: Weights) -> Any:
    model.load_state_dict(weights, assign=True)
    return model


def into_empty_memory(model: Any, weights: Weights) -> Any:
    model.to_empty(device="cpu").load_state_dict(weights)
    return model


def in_two_loads(model: Any, weights: Weights) -> Any:
    with warnings.catch_warnings():
        for half in (0, 1):
            model.load_state_dict(dict(list(weights.items())[half::2]), assign=True, strict=False)
    return model


def module_by_module(model: Any, weights: Weights) -> Any:
    for path, module in model.named_modules():
        if module._parameters:
            own = {
                name.removeprefix(f"{path}."): value for name, value in weights.items() if name.startswith(f"{path}.")
            }
            module.load_state_dict(own, assign=True)
    return model


def tensor_by_tensor(model: Any, weights: Weights) -> Any:
    for name, value in weights.items():
        set_module_tensor_to_device(model, name, "cpu", value=value)
    return model


def dispatched(model: Any, weights: Weights) -> Any:
    return accelerate.dispatch_model(assigned(model, weights), {"": "cpu"})


def moved(model: Any, weights: Weights) -> Any:
    return assigned(model, weights).to("cpu")


def copied_before(model: Any, weights: Weights) -> Any:
    return assigned(copy.deepcopy(model), weights)


WAYS = [
    assigned,
    into_empty_memory,
    in_two_loads,
    module_by_module,
    tensor_by_tensor,
    dispatched,
    moved,
    copied_before,
]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT, use_cache=False).logits


def name_of(function: Callable[..., Any]) -> str:
    return function.__name__.replace("_", " ")


@pytest.mark.parametrize("built", [on_meta, parameters_on_meta], ids=name_of)
@pytest.mark.parametrize("load", WAYS, ids=name_of)
def test_weights_may_come_any_way(built: Callable[..., Any], load: Callable[..., Any]) -> None:
    source = build(TINY, KINDS).half()
    weights = {name: value.clone() for name, value in source.state_dict().items()}
    model = load(built(source.config), weights)
    assert torch.equal(logits(model), logits(qwen2_fp16_fix.fix(source)))
    found = qwen2_fp16_fix.status(model).model
    assert found is not None
    assert found.fixed
    assert found.ranges == qwen2_fp16_fix.status(source).model.ranges
    assert {row.keys for row in found.ranges} == {"centred"}


@pytest.mark.parametrize("rope", [None, "dynamic", "longrope"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_frequencies_of_every_variant_are_computed_anew(rope: str | None, dtype: torch.dtype) -> None:
    """In fp32, too, where stock's own forward follows. A long prompt changes those of some variants."""
    source = build(TINY, (), **rotation_of(rope)).to(dtype)
    model = assigned(stock_on_meta(source.config).to(dtype), source.state_dict())
    for each in (model, source):
        qwen2_fp16_fix.fix(each)
    ids = random_prompt(TINY, batch=1, length=40)
    with torch.no_grad():
        expected, found = (each(input_ids=ids, use_cache=False).logits for each in (source, model))
        assert torch.equal(found, expected)
        assert torch.equal(logits(model), logits(source))
    assert torch.isfinite(logits(qwen2_fp16_fix.unfix(model).float())).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_first_forward_may_be_compiled(dtype: torch.dtype) -> None:
    """The compiler must not trace how the frequencies come back."""
    torch._dynamo.reset()
    source = qwen2_fp16_fix.fix(build(TINY, ()))
    rotary, inputs = on_meta(source.config).model.rotary_emb, (torch.zeros(1, 1, 1, dtype=dtype), torch.arange(9)[None])
    found = torch.compile(rotary, backend="eager", fullgraph=True)(*inputs)
    assert all(map(torch.equal, found, source.model.rotary_emb(*inputs)))


def test_a_model_without_its_weights_keeps_its_plan_due() -> None:
    """Half a checkpoint gave the other half neither exponents nor a centre, for ever."""
    source = build(TINY, KINDS).half()
    weights = source.state_dict()
    model = on_meta(source.config)
    first = {name: value for name, value in weights.items() if ".layers.1." not in name}
    model.load_state_dict(first, assign=True, strict=False)
    assert [layer.plan_due for layer in model.model.layers[:2]] == [False, True]
    with pytest.raises(qwen2_fp16_fix.MetaTensorError, match=r"layers.1.*load the weights first"):
        logits(model)
    tensor_by_tensor(model, {name: weights[name] for name in weights.keys() - first.keys()})
    assert torch.equal(logits(model), logits(qwen2_fp16_fix.fix(source)))
