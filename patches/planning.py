"""Gives each layer the exponents that its weights ask for, and takes them away when the weights change.

A plan is an integer for the MLP and one for the output projection of a layer, from the bounds in `range_plan.py`. It
holds for the weights it was made from: a layer whose weights cannot be bounded, or have changed, scales by token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .caches import witness
from .keys import ExactBiasLinear, centre_factors
from .range_plan import Exponents, LayerShape, bound_layer, layer_shapes, plan_layer, unproven_sites
from .scaling import Scaled

BIASED = ("q_proj", "k_proj", "v_proj")  # the linears a Qwen2 gives a bias, and the bounds know one of
SCALED = {"product", "down_proj", "o_proj"}  # the sites an exponent is for


def plan_layers(base: Any) -> None:
    """Plans every layer of a Qwen2Model whose parts are fixed: the centre of its keys, and its exponents."""
    for layer in base.layers:
        rotary = rotary_of(base, layer)
        shape = layer_shape(layer, rotary)
        layer.self_attn.centre_keys(rotary.frequencies(), shape.positions, shape.rotation_scale)
        weights = boundable_weights(layer)
        bounds = None if weights is None else bound_layer(weights, shape)
        if bounds is None or SCALED & {*unproven_sites(bounds, exponents := plan_layer(bounds))}:
            drop_plan(layer)  # an exponent that proves nothing would only sink small values
        else:
            keep_plan(layer, exponents)
    introduce_layers(base)


def rotary_of(base: Any, layer: Any) -> Any:
    """The model's rotary embedding, or each layer's own before 4.45."""
    return getattr(base, "rotary_emb", None) or layer.self_attn.rotary_emb


def introduce_layers(base: Any) -> None:
    """Lets the attention of each layer know the centres of all: together they tell whose keys a cache holds."""
    witnesses = []
    for layer in base.layers:
        attention, rotary = layer.self_attn, rotary_of(base, layer)
        if attention.key_shift is not None:
            frequencies = rotary.frequencies().double().cpu()
            mean = centre_factors(frequencies, attention.config.max_position_embeddings)
            witnesses.append(witness(attention.layer_idx, attention.key_shift, frequencies, mean))
    for layer in base.layers:
        layer.self_attn.__dict__["witnesses"] = tuple(witnesses)


def keep_plan(layer: Any, exponents: Exponents) -> None:
    """Gives the layer its exponents, for its weights as they are."""
    device = layer.mlp.down_proj.weight.device
    layer.mlp.set_exponent(exponents.mlp, device)
    if isinstance(layer.self_attn, Scaled):  # flash attention before 4.48 is stock's, its o_proj included
        layer.self_attn.set_exponent(exponents.o_proj, device)
    layer.__dict__["planned"] = fingerprint(layer)


def layer_shape(layer: Any, rotary: Any = None) -> LayerShape:
    """The sizes of a layer, and the factor that yarn and longrope put on the rotation."""
    config = layer.self_attn.config
    return LayerShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=layer.self_attn.head_dim,
        positions=config.max_position_embeddings,
        activation=config.hidden_act,
        rotation_scale=float(getattr(rotary, "attention_scaling", 1.0)),
    )


def boundable_weights(layer: Any) -> dict[str, Tensor] | None:
    """The weights of a layer by their names in a checkpoint; None if one is wrapped, quantised, unknown or not whole.

    Not whole: a shard, a flat parameter's view, a weight that pruning computes, or one that is elsewhere meanwhile.
    """
    shapes = layer_shapes(layer_shape(layer), layer.mlp.intermediate_size)
    weights: dict[str, Tensor] = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{norm}.weight"] = getattr(layer, norm).weight
    for owner in ("self_attn", "mlp"):
        for name, linear in getattr(layer, owner).named_children():
            if name.endswith("_proj"):
                if type(linear) not in (nn.Linear, ExactBiasLinear) or (linear.bias is not None and name not in BIASED):
                    return None
                for parameter, value in linear.named_parameters():
                    weights[f"{owner}.{name}.{parameter}"] = value
    if not all(type(w) in (nn.Parameter, Tensor) and w.is_floating_point() and not w.is_meta for w in weights.values()):
        return None
    whole = {name: shape for name, shape in shapes.items() if name in weights or name.endswith(".weight")}
    if {name: tuple(weight.shape) for name, weight in weights.items()} != whole:
        return None
    return {name: weight.detach() for name, weight in weights.items()}


def fingerprint(layer: Any) -> tuple[Any, ...]:
    """Changes whenever a weight of the layer is replaced, moved or written to in place (but not through `.data`)."""
    parts = layer._modules
    children = [*parts.values(), *parts["self_attn"]._modules.values(), *parts["mlp"]._modules.values()]
    weights = [weight for child in children for weight in child._parameters.values() if weight is not None]
    versions = [0 if weight.is_inference() else weight._version for weight in weights]
    return (*map(id, children), *map(id, weights), *map(Tensor.data_ptr, weights), *versions)


def drop_plan(layer: Any) -> None:
    """Lets the layer scale by token."""
    layer.__dict__.pop("planned", None)
    for part in (layer.mlp, layer.self_attn):
        for name in ("exponent", "zero", "factor"):
            part.__dict__.pop(name, None)


def drop_stale_plan(layer: Any) -> None:
    """Drops a plan made for other weights. Compiled code does not look: there, what ends a plan is an event."""
    if torch.compiler.is_compiling():
        return
    planned = layer.__dict__.get("planned")
    if planned is not None and planned != fingerprint(layer):
        drop_plan(layer)


@contextmanager
def plan_kept(layer: Any) -> Iterator[None]:
    """Around a move or a cast of the layer: a good plan stays good if the weights' float16 values are the same.

    They are, unless the layer has gone to a type that is neither fp32 nor float16, or off to the meta device.
    """
    planned = layer.__dict__.get("planned")
    good = planned is not None and planned == fingerprint(layer)
    exponents = Exponents(layer.mlp.exponent, getattr(layer.self_attn, "exponent", 0))
    yield
    if not good:
        return
    weights = boundable_weights(layer)
    if weights is None or any(w.dtype not in (torch.float16, torch.float32) for w in weights.values()):
        drop_plan(layer)
    else:
        keep_plan(layer, exponents)
