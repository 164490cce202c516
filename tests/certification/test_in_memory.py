"""A model in memory that will not run as its weights are bounded: by token, in training, or with another part."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qwen2_fp16_fix
from tests.stress import TINY, build, random_prompt

PROMPT = random_prompt(TINY, 1, 8)


def fixed(**settings: Any) -> Any:
    return qwen2_fp16_fix.fix(build(TINY, (), **settings).half())


def trained(model: Any) -> Any:
    model(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    return model


def fixed_after_a_backward() -> Any:
    return qwen2_fp16_fix.fix(trained(build(TINY, ()).half()))


def a_stock_model_with_gradients() -> Any:
    return trained(build(TINY, ()).half())


def offloaded() -> Any:
    import accelerate

    model = fixed()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model(PROMPT)
    return model


def with_another_module_inside() -> Any:
    model = fixed()
    model.model.layers[2].self_attn.extra = torch.nn.Linear(2, 2)
    return model


def pruned() -> Any:
    from torch.nn.utils import prune

    model = fixed()
    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5)  # type: ignore[no-untyped-call]
    return model


def with_a_forward_of_its_own() -> Any:
    model = build(TINY, ()).half()
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda hidden_states: forward(hidden_states) * 1e5
    return model


def with_a_forward_that_was_set_later() -> Any:
    model = fixed()
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda hidden_states: forward(hidden_states) * 1e5
    return model


def with_a_class_of_its_own() -> Any:
    model = build(TINY, ()).half()
    mlp = model.model.layers[1].mlp
    mlp.__class__ = type("Other", (type(mlp),), {"forward": lambda self, hidden_states: hidden_states * 1e5})
    return model


def in_training_with_dropout() -> Any:
    return fixed(attention_dropout=0.99).train()


def with_an_eps_of_its_own() -> Any:
    model = fixed()
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-60
    return model


def with_endless_frequencies() -> Any:
    model = fixed()
    model.model.rotary_emb.inv_freq[0] = float("inf")
    return model


BY_TOKEN = {
    fixed_after_a_backward: "a weight holds a gradient",
    a_stock_model_with_gradients: "a weight holds a gradient",
    offloaded: "is not loaded",
    with_another_module_inside: "layer 2: one of its weights is wrapped, quantised, sharded or not loaded here",
    pruned: "layer 1: one of its weights is wrapped, quantised, sharded or not loaded here",
}
OTHERWISE = {
    in_training_with_dropout: "it is in training, where its attention_dropout of 0.99",
    with_an_eps_of_its_own: "rms_norm_eps is 1e-60",
    with_endless_frequencies: "rotary_emb.inv_freq holds frequencies",
}


@pytest.mark.parametrize("make", BY_TOKEN | OTHERWISE, ids=lambda make: make.__name__)
def test_what_will_run_otherwise_is_not_proven(make: Callable[[], Any]) -> None:
    """`certify` bounded the weights and called all but the offloaded one proven."""
    model = make()
    for found in (qwen2_fp16_fix.certify(model), qwen2_fp16_fix.certify(model)):
        assert not found.proven
        assert any((BY_TOKEN | OTHERWISE)[make] in reason for reason in found.reasons), found.reasons


CONFLICTS = {
    with_a_forward_of_its_own: "layers.1.mlp has a forward of its own",
    with_a_forward_that_was_set_later: "layers.1.mlp has a forward of its own",
    with_a_class_of_its_own: "layers.1.mlp is a ",
}


@pytest.mark.parametrize("make", CONFLICTS, ids=lambda make: make.__name__)
def test_a_part_that_computes_something_else_is_named(make: Callable[[], Any]) -> None:
    """Its weights were bounded, whatever it makes of them. The fix refuses such a model with the same sentence."""
    assert CONFLICTS[make] in qwen2_fp16_fix.certify(make()).verdict


def test_a_stock_part_in_a_fixed_layer_is_named() -> None:
    """`status` ended in an AttributeError."""
    model = fixed()
    model.model.layers[1].mlp = build(TINY, ()).half().model.layers[1].mlp
    assert not qwen2_fp16_fix.certify(model).proven
    assert not qwen2_fp16_fix.status(model).model.fixed  # type: ignore[union-attr]


FIXED = [make for make in BY_TOKEN | OTHERWISE if make is not a_stock_model_with_gradients]


@pytest.mark.parametrize("make", FIXED, ids=lambda make: make.__name__)
def test_status_says_what_no_certificate_covers(make: Callable[[], Any]) -> None:
    found = qwen2_fp16_fix.status(make()).model
    assert found is not None
    said = OTHERWISE.get(make, "layers scale by token, which no certificate covers")
    assert any(said in sentence for sentence in found.uncovered), found.uncovered
    assert said in found.summary()
    assert qwen2_fp16_fix.status(fixed()).model.uncovered == []  # type: ignore[union-attr]


def grown_gate() -> Any:
    """Its MLP reads a scaled input in every layer."""
    model = build(TINY, ())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.mul_(4e3)
            layer.mlp.down_proj.weight.mul_(1e-3)
    return qwen2_fp16_fix.fix(model.half())


def test_a_backward_hook_on_a_scaled_projection_is_named() -> None:
    """Such a projection is called as it is, so its product is not scaled. Where nothing is scaled it may be."""
    model = grown_gate()
    assert qwen2_fp16_fix.certify(model).proven
    handle = model.model.layers[1].mlp.gate_proj.register_full_backward_hook(lambda module, inputs, outputs: None)
    found = qwen2_fp16_fix.certify(model)
    assert found.reasons == ["layer 1: mlp.gate_proj has backward hooks, so it is called as in stock, unscaled"]
    handle.remove()
    assert qwen2_fp16_fix.certify(model).proven
    plain = fixed()
    plain.model.layers[1].mlp.gate_proj.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert qwen2_fp16_fix.certify(plain).proven


def test_an_activation_that_is_not_the_configs_is_named() -> None:
    model = build(TINY, ()).half()
    model.model.layers[3].mlp.act_fn = torch.nn.Softplus()
    assert qwen2_fp16_fix.certify(model).reasons == ["layer 3: its activation is a Softplus, but its config names silu"]


def test_a_layer_that_is_not_proven_is_not_said_to_be_stale() -> None:
    """The first reason was that its exponents were for other weights. It never had any."""
    model = build(TINY, ()).half()
    with torch.no_grad():
        for linear in (model.model.layers[2].mlp.gate_proj, model.model.layers[2].mlp.up_proj):
            linear.weight[5] = 6e4
    (reason, *others) = qwen2_fp16_fix.certify(qwen2_fp16_fix.fix(model)).reasons
    assert reason.startswith("layer 2: product is bounded by ")
    assert not any("planned" in other for other in others)
