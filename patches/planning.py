"""Makes the plan of each layer, and decides when: at `fix`, before a forward, and around moves and casts.

A plan is the exponents of a layer, from the bounds of its weights (`range_plan.py`). It holds for the weights it was
made from. `layer_plan.py` has what ends it. A layer without a plan scales by token; it gets none if its weights cannot
be bounded, or if the exponents do not prove it in range. A plan that has ended is made again at the next forward after
`eval()`, a load or `fix`, unless a weight still holds a gradient that an optimiser could apply.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .architecture import QWEN2
from .cache_origin import Witness, witness
from .errors import PatchConflictError
from .key_centring import centre_factors
from .layer_plan import (
    are_transformed,
    device_of_norm,
    drop_plan,
    drop_stale_plan,
    finish_planning,
    holds_gradients,
    keep_plan,
    keep_ranges,
    note_trace,
    prepare_layer,
    refuse_unloaded,
    unloaded_weight,
    warn_of_no_plan,
    weights_of,
    widen_norms,
)
from .overflow import OverflowWatch
from .range_bounds import UNSCALED, LayerShape, layer_shapes
from .range_plan import PlannedLayer, plan_layer, unproven_sites
from .swap import layers_of, module_at

ATTENTION, MLP, FINAL_NORM = QWEN2.path("attention"), QWEN2.path("mlp"), QWEN2.final_norm()
#: The method that tells a fixed part from a stock one, by the part.
METHODS = {ATTENTION: "centre_keys", MLP: "set_exponent"}
#: Held while a plan is made, so that threads whose first forwards meet wait for one plan. Every copy of a layer shares
#: it.
PLANNING = threading.RLock()


def plan_layers(base: Any) -> None:
    """Plans every layer of a Qwen2Model whose parts are fixed: the centre of its keys, and its exponents."""
    expect_plans(base)
    for layer in layers_of(base):
        make_plan(layer)


def expect_plans(base: Any) -> None:
    """Makes every layer of a Qwen2Model plan itself at its next forward, so that weights may be loaded until then."""
    norm = getattr(base, FINAL_NORM)
    watch = norm.__dict__["watch"] = OverflowWatch(norm.weight.device)
    witnesses: dict[int, Witness] = {}  # one dict for all layers: together they tell whose keys a cache holds
    for layer in layers_of(base):
        prepare_layer(layer, rotary_of(base, layer), watch)
        getattr(layer, ATTENTION).__dict__["witnesses"] = witnesses


def rotary_of(base: Any, layer: Any) -> Any:
    """The rotary embedding of a layer: the base model's, or before transformers 4.45 the layer's own."""
    for part in QWEN2.parts:
        if part.role == "rotary":
            shared = part.below_layer is None
            found = module_at(base, part.path) if shared else module_at(layer, str(part.below_layer))
            if found is not None:
                return found
    raise AttributeError(f"this {type(base).__qualname__} has no rotary embedding")


def make_plan(layer: Any) -> None:
    """Centres the keys of a layer, and gives it the exponents of its weights if these can be bounded.

    While a weight holds a gradient, an optimiser may still write to it. The layer then scales by token.
    """
    # A first forward may run in inference mode. Tensors made here must serve later forwards outside of it.
    with PLANNING, torch.inference_mode(False), torch.no_grad():
        layer.rotary.restore(device_of_norm(layer))
        centre_keys(layer)
        layer.watch.reset()
        drop_plan(layer, due=True)
        if holds_gradients(layer) or unloaded_weight(layer):
            return
        planned = proven_plan(layer)
        # An adapter adds to products that need the exponents they had, so those of wrapped weights stay.
        if planned is not None or boundable_weights(layer) is not None:
            keep_ranges(layer, UNSCALED if planned is None else planned.exponents)
            widen_norms(layer, None if planned is None else planned.bounds)
        if planned is not None:
            keep_plan(layer, planned.exponents)
        finish_planning(layer)


def centre_keys(layer: Any) -> None:
    """Chooses the centre of the keys for their bias as it is."""
    shape, attention = layer_shape(layer, layer.rotary), getattr(layer, ATTENTION)
    frequencies = first_frequencies(layer.rotary)
    attention.centre_keys(frequencies, shape.positions, shape.rotation_scale)
    if attention.key_shift is None:
        attention.witnesses.pop(attention.layer_idx, None)
    else:
        exact = frequencies.cpu().double()
        seen = witness(attention.layer_idx, attention.key_shift, exact, centre_factors(exact, shape.positions))
        attention.witnesses[attention.layer_idx] = seen


def first_frequencies(rotary: Any) -> Tensor:
    """The frequencies (head_dim/2,) that a rotary embedding started with.

    Some variants change them as prompts grow; a cache may hold keys from before.
    """
    first = getattr(rotary, "original_inv_freq", None)
    is_there = isinstance(first, Tensor) and first.dtype == torch.float32 and not first.is_meta
    return first if is_there else rotary.frequencies()  # type: ignore[return-value]


def proven_plan(layer: Any) -> PlannedLayer | None:
    """The exponents that prove a layer in range. None if its weights cannot be bounded, or if no exponent proves it."""
    weights = boundable_weights(layer)
    if weights is None:
        return None
    planned = plan_layer(weights, layer_shape(layer, layer.rotary))
    # Without a proof an exponent has no use and only rounds small values away.
    return None if unproven_sites(planned.bounds, planned.exponents) else planned


def layer_shape(layer: Any, rotary: Any = None) -> LayerShape:
    """The sizes of a layer, and the factor that yarn and longrope put on the rotation."""
    attention = getattr(layer, ATTENTION)
    config = attention.config
    return LayerShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        positions=config.max_position_embeddings,
        activation=config.hidden_act,
        rotation_scale=float(getattr(rotary, "attention_scaling", 1.0)),
    )


def boundable_weights(layer: Any) -> dict[str, Tensor] | None:
    """The weights of a layer by their names in a checkpoint; None if one is wrapped, quantised, unknown or not whole.

    Not whole: a shard, the view of a flat parameter, a weight that pruning computes, a weight that is not loaded.
    """
    linears = plain_linears(layer)
    if linears is None:
        return None
    weights: dict[str, Tensor] = {f"{norm}.weight": module_at(layer, norm).weight for norm in QWEN2.norms()}
    for name, linear in linears.items():
        weights |= {f"{name}.{parameter}": value for parameter, value in linear.named_parameters()}
    if not all(type(w) in (nn.Parameter, Tensor) and w.is_floating_point() and not w.is_meta for w in weights.values()):
        return None
    shapes = layer_shapes(layer_shape(layer), getattr(layer, MLP).intermediate_size)
    whole = {name: shape for name, shape in shapes.items() if name in weights or name.endswith(".weight")}
    if {name: tuple(weight.shape) for name, weight in weights.items()} != whole:
        return None
    return {name: weight.detach() for name, weight in weights.items()}


def plain_linears(layer: Any) -> dict[str, nn.Module] | None:
    """The linears of a layer by their paths below it.

    None if one is wrapped or quantised, has a bias that no bound covers, or is not in the model's row.
    """
    known, norms = {linear.name: linear for linear in QWEN2.linears}, QWEN2.norms()
    found: dict[str, nn.Module] = {}
    for owner in QWEN2.owners():
        for child_name, child in getattr(layer, owner).named_children():
            name = f"{owner}.{child_name}"
            if name in known:
                if type(child) is not nn.Linear or (child.bias is not None and not known[name].bias):
                    return None
                found[name] = child
            elif name not in norms and any(True for _ in child.parameters()):
                return None
    return found


def settle_plan(layer: Any, hidden_states: Tensor | None = None) -> None:
    """Before a forward of these hidden states: drops a plan that may not hold, and makes one that is due.

    Not inside a backward: gradient checkpointing must recompute exactly what the forward did.
    Raises MetaTensorError if the layer has no weights yet and the hidden states have numbers.
    """
    if torch.compiler.is_compiling():
        layer.settle_in_trace(torch.is_grad_enabled())
        # Never raised: `settle_in_trace` has dropped a suspect plan. The branch is there for Dynamo, which guards what
        # it has read. Once a backward has set `suspect`, compiled code is traced again.
        if layer.plan is not None and layer.plan.suspect:
            raise AssertionError("a suspect plan has just been dropped")
    elif torch._C._current_graph_task_id() == -1:
        drop_stale_plan(layer)
        if layer.plan_due:
            if hidden_states is not None and not hidden_states.is_meta:
                refuse_unloaded(layer)
            make_due_plan(layer)


def make_due_plan(layer: Any) -> None:
    """Makes a plan that is due. It stays due while weights are not loaded or an optimiser can still write to them."""
    if torch._C._get_tracing_state() is not None:
        warn_of_no_plan(layer)
    elif layer.rotary.frequencies().is_meta or is_replica(layer) or is_faked() or are_transformed(weights_of(layer)):
        return
    elif not holds_gradients(layer):
        with PLANNING:
            if layer.plan_due:  # another thread may have made it while this one waited
                check_parts(layer)
                make_plan(layer)


def is_replica(layer: Any) -> bool:
    """Whether DataParallel has made this layer. It lives for one forward."""
    return getattr(layer, "_is_replica", False)


def is_faked() -> bool:
    """Whether a FakeTensorMode is on, in which tensors have shapes and no values."""
    return type(_get_current_dispatch_mode()).__name__ == "FakeTensorMode"


def check_parts(layer: Any) -> None:
    """Raises PatchConflictError if a part was replaced since the model was fixed: half a fix protects nothing."""
    for name, method in METHODS.items():
        part = getattr(layer, name)
        if not hasattr(part, method):
            found = type(part)
            raise PatchConflictError(
                f"{name} is a {found.__module__}.{found.__qualname__}, put into a layer after that was fixed: build "
                "the model inside `with qwen2_fp16_fix.stock_models():` and run it in bfloat16 or float32."
            )


def settle_in_trace(layer: Any, in_grad_mode: bool) -> None:
    """`settle_plan` while a compiler traces the layer. It runs on the real layer, once a trace.

    Compiled code does not look at the weights. There a plan ends when a weight is loaded, cast or replaced. No plan is
    kept if an optimiser may write to the weights later, or if torch.export shows other tensors in their place.
    """
    weights = weights_of(layer)
    note_trace(layer)
    if not all(type(weight) in (nn.Parameter, Tensor) for weight in weights):
        warn_of_no_plan(layer)
        drop_plan(layer, due=layer.plan is not None or layer.plan_due)
        return
    drop_stale_plan(layer)
    if layer.plan_due:
        make_due_plan(layer)
    if in_grad_mode and any(weight.requires_grad for weight in weights):
        drop_plan(layer)


def settle_for(layer: Any, training: bool) -> None:
    """At `train()` or `eval()` of a layer that a compiler has traced: settles it as its next trace would."""
    drop_stale_plan(layer)
    if training and any(weight.requires_grad for weight in weights_of(layer)):
        drop_plan(layer)
    elif layer.plan_due:
        make_due_plan(layer)


def check_plan(layer: Any) -> None:
    """As before a forward. Also drops a plan whose exponents differ from those of the weights' present values."""
    settle_plan(layer)
    if layer.plan is not None:
        planned = proven_plan(layer)
        if planned is None or planned.exponents != layer.plan.exponents:
            drop_plan(layer)


@contextmanager
def plan_kept(layer: Any) -> Iterator[None]:
    """Around a move or a cast of the layer: keeps a plan that holds, if the weights' float16 values stay the same.

    They do, unless the layer goes to a dtype that is neither fp32 nor float16, or to the meta device.
    """
    drop_stale_plan(layer)
    plan = layer.plan
    yield
    if plan is None:
        return
    weights = boundable_weights(layer)
    if weights is None or any(w.dtype not in (torch.float16, torch.float32) for w in weights.values()):
        drop_plan(layer, due=True)
    else:
        keep_plan(layer, plan.exponents)
