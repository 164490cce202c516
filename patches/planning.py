"""Gives each layer the exponents that its weights ask for, and takes them away when the weights may have changed.

A plan is an integer for the MLP and one for the output projection of a layer, from the bounds in `range_plan.py`. It
holds for the weights it was made from: a layer whose weights cannot be bounded, or have changed, scales by token.

Weights change in ways that leave a trace (`fingerprint`) and in ways that leave none: fused optimisers, `.data`, numpy.
So a plan is dropped, too, after a backward through its layer (an optimiser is about to write) and after a forward that
was not finite (`overflow.py`: an exponent that is too small can only overflow). It is made anew at the next forward
after `eval()`, a load or `fix`, while no weight holds a gradient that an optimiser could still apply.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .caches import Witness, witness
from .errors import NotFixedWarning, PatchConflictError, StalePlanWarning
from .key_centring import centre_factors
from .overflow import OverflowWatch
from .range_plan import Exponents, LayerShape, bound_layer, layer_shapes, plan_layer, unproven_sites
from .scaling import Scaled
from .swap import layers_of

BIASED = ("q_proj", "k_proj", "v_proj")  # the linears a Qwen2 gives a bias, and the bounds know one of
SCALED = {"product", "down_proj", "o_proj"}  # the sites an exponent is for


@dataclass(eq=False)
class Plan:
    """The exponents of a layer, and what they hold for."""

    exponents: Exponents
    fingerprint: tuple[Any, ...]
    device: torch.device  # where the weights are
    suspect: bool = False  # a backward went through the layer: its weights may be written to without a trace

    def suspect_from_now_on(self, *_: Any) -> None:
        """A hook for autograd."""
        self.suspect = True


def plan_layers(base: Any) -> None:
    """Plans every layer of a Qwen2Model whose parts are fixed: the centre of its keys, and its exponents."""
    expect_plans(base)
    for layer in layers_of(base):
        make_plan(layer)


def expect_plans(base: Any) -> None:
    """Lets every layer of a Qwen2Model plan itself at its next forward: who loads weights need not say so."""
    watch = base.norm.__dict__["watch"] = OverflowWatch(base.norm.weight.device)
    witnesses: dict[int, Witness] = {}  # of all layers: together they tell whose keys a cache holds
    for layer in layers_of(base):
        rotary = getattr(base, "rotary_emb", None) or layer.self_attn.rotary_emb  # each layer's own before 4.45
        layer.__dict__.update(rotary=rotary, watch=watch, plan_due=True)
        layer.self_attn.__dict__["witnesses"] = witnesses


def make_plan(layer: Any) -> None:
    """Centres the keys of a layer, and gives it the exponents of its weights where these can be bounded.

    While a weight holds a gradient an optimiser may still write to it, so the layer scales by token until then.
    """
    with torch.inference_mode(False), torch.no_grad():  # in which a first forward may come: what is made here stays
        centre_keys(layer)
        layer.watch.reset()
        drop_plan(layer, due=holds_gradients(layer))
        exponents = None if layer.plan_due else exponents_for(layer)
        if exponents is not None:
            keep_plan(layer, exponents)


def centre_keys(layer: Any) -> None:
    """Chooses the centre of the keys for their bias as it is."""
    shape, attention, frequencies = layer_shape(layer, layer.rotary), layer.self_attn, first_frequencies(layer.rotary)
    attention.centre_keys(frequencies, shape.positions, shape.rotation_scale)
    if attention.key_shift is None:
        attention.witnesses.pop(attention.layer_idx, None)
    else:
        exact = frequencies.cpu().double()
        seen = witness(attention.layer_idx, attention.key_shift, exact, centre_factors(exact, shape.positions))
        attention.witnesses[attention.layer_idx] = seen


def first_frequencies(rotary: Any) -> Tensor:
    """What a rotary embedding began with: variants change it as prompts grow, and caches outlive that."""
    first = getattr(rotary, "original_inv_freq", None)
    is_there = isinstance(first, Tensor) and first.dtype == torch.float32 and not first.is_meta
    return first if is_there else rotary.frequencies()  # type: ignore[return-value]


def exponents_for(layer: Any) -> Exponents | None:
    """The exponents that prove a layer in range; None where its weights cannot be bounded, or no exponent helps."""
    weights = boundable_weights(layer)
    if weights is None:
        return None
    bounds = bound_layer(weights, layer_shape(layer, layer.rotary))
    exponents = plan_layer(bounds)  # one that proves nothing would only sink small values
    return None if SCALED & {*unproven_sites(bounds, exponents)} else exponents


def keep_plan(layer: Any, exponents: Exponents) -> None:
    """Gives the layer its exponents, for its weights as they are."""
    device = layer.mlp.down_proj.weight.device
    layer.mlp.set_exponent(exponents.mlp, device)
    if isinstance(layer.self_attn, Scaled):  # flash attention before 4.48 is stock's, its o_proj included
        layer.self_attn.set_exponent(exponents.o_proj, device)
    layer.__dict__["plan"] = Plan(exponents, fingerprint(layer), device)


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
                if type(linear) is not nn.Linear or (linear.bias is not None and name not in BIASED):
                    return None
                for parameter, value in linear.named_parameters():
                    weights[f"{owner}.{name}.{parameter}"] = value
    if not all(type(w) in (nn.Parameter, Tensor) and w.is_floating_point() and not w.is_meta for w in weights.values()):
        return None
    whole = {name: shape for name, shape in shapes.items() if name in weights or name.endswith(".weight")}
    if {name: tuple(weight.shape) for name, weight in weights.items()} != whole:
        return None
    return {name: weight.detach() for name, weight in weights.items()}


def children_of(layer: Any) -> list[nn.Module]:
    """The parts of a layer, and theirs: norms and linears among them."""
    parts = layer._modules
    return [*parts.values(), *parts["self_attn"]._modules.values(), *parts["mlp"]._modules.values()]


def weights_of(layer: Any) -> list[Tensor]:
    """The parameters of these; what an adapter or a quantiser holds further in is not listed."""
    return [weight for child in children_of(layer) for weight in child._parameters.values() if weight is not None]


def fingerprint(layer: Any) -> tuple[Any, ...]:
    """Changes whenever a weight of the layer is replaced, moved or written to in a way that torch counts."""
    weights = weights_of(layer)
    if are_transformed(weights):
        return ()
    versions = [0 if weight.is_inference() else weight._version for weight in weights]
    return (*map(id, children_of(layer)), *map(id, weights), *map(Tensor.data_ptr, weights), *versions)


def are_transformed(weights: list[Tensor]) -> bool:
    """Whether torch.func has put other tensors in the place of the weights, of which nothing can be asked."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, weights))


def holds_gradients(layer: Any) -> bool:
    """Whether an optimiser has something to apply to a weight of the layer."""
    return any(weight.grad is not None for weight in layer.parameters())


def drop_plan(layer: Any, due: bool = False) -> None:
    """Lets the layer scale by token; `due`: until its next forward, which plans anew."""
    for part in (layer.mlp, layer.self_attn):
        if hasattr(part, "set_exponent"):  # inside a wrapper, too
            part.set_exponent(None)
    layer.__dict__.update(plan=None, plan_due=due)


def drop_stale_plan(layer: Any) -> None:
    """Drops a plan that may not hold for the weights any more, by what can be told without looking at their values.

    Weights on another device have been dispatched, one by one, by a tool that tells no module: they are planned anew.
    """
    plan = layer.plan
    if plan is None:
        return
    if layer.watch.has_overflowed():
        warn_of_overflow(layer.watch)
    elif not plan.suspect and plan.fingerprint == fingerprint(layer):
        return
    drop_plan(layer, due=layer.plan_due or any(weight.device != plan.device for weight in weights_of(layer)))


def warn_of_overflow(watch: OverflowWatch) -> None:
    """Says once that a forward was not finite, although every layer was planned to be."""
    if not watch.said:
        watch.said = True
        warnings.warn(STALE, StalePlanWarning, stacklevel=2)


STALE = (
    "a forward of this model has ended in numbers that are not finite: its input or a weight was not, or weights have "
    "changed in a way that leaves no trace and the exponents were for the old ones. From here on every layer scales "
    "by token; call qwen2_fp16_fix.fix(model), or model.eval(), to plan anew."
)


UNPLANNED = (
    "this model has not run since it was built or loaded, so what is exported or traced now stores its keys uncentred, "
    "as stock does, and scales by token: run a forward, or call qwen2_fp16_fix.fix(model), before."
)


def settle_plan(layer: Any) -> None:
    """Before a forward: drops a plan that may not hold, and makes one that is due.

    Not inside a backward: a checkpoint's recomputation must repeat what the forward did.
    """
    if torch.compiler.is_compiling():
        layer.settle_in_trace(torch.is_grad_enabled())
        if layer.plan is not None and layer.plan.suspect:  # asked so that it is traced anew when a backward comes
            raise AssertionError("a suspect plan has just been dropped")
    elif torch._C._current_graph_task_id() == -1:
        drop_stale_plan(layer)
        if layer.plan_due:
            make_due_plan(layer)


def make_due_plan(layer: Any) -> None:
    """Makes a plan for the weights that are there. Where they are not, or an optimiser still writes, it stays due."""
    if torch._C._get_tracing_state() is not None:
        warn_of_no_plan(layer)
    elif layer.rotary.frequencies().is_meta or is_replica(layer) or is_faked() or are_transformed(weights_of(layer)):
        return
    elif not holds_gradients(layer):
        check_parts(layer)
        make_plan(layer)


def is_replica(layer: Any) -> bool:
    """Whether DataParallel has made this layer, for one forward."""
    return getattr(layer, "_is_replica", False)


def is_faked() -> bool:
    """Whether a FakeTensorMode computes shapes alone."""
    return type(_get_current_dispatch_mode()).__name__ == "FakeTensorMode"


def check_parts(layer: Any) -> None:
    """Raises PatchConflictError where a part was replaced since the model was fixed: half a fix is none."""
    for name, needed in (("self_attn", "centre_keys"), ("mlp", "set_exponent")):
        found = type(getattr(layer, name))
        if not hasattr(getattr(layer, name), needed):
            raise PatchConflictError(
                f"{name} is a {found.__module__}.{found.__qualname__}, put into a layer that was fixed before: build "
                "the model inside `with qwen2_fp16_fix.stock_models():` and run it in bfloat16 or float32."
            )


def warn_of_no_plan(layer: Any) -> None:
    """Says that a program is being made of a model whose keys nothing has centred yet."""
    if layer.plan_due and layer.self_attn.shift is None:
        warnings.warn(UNPLANNED, NotFixedWarning, stacklevel=2)


def settle_in_trace(layer: Any, in_grad_mode: bool) -> None:
    """The same while a compiler traces, on the real layer: compiled code itself looks at no weight.

    Where an optimiser may write to the weights later, or torch.export shows others in their place, no plan holds.
    """
    weights = weights_of(layer)
    layer.__dict__["traced"] = True
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
    """At `train()` or `eval()` of a layer that a compiler has traced: as its next trace would find it settled."""
    drop_stale_plan(layer)
    if training and any(weight.requires_grad for weight in weights_of(layer)):
        drop_plan(layer)
    elif layer.plan_due:
        make_due_plan(layer)


def check_plan(layer: Any) -> None:
    """As before a forward, and drops a plan whose exponents are not those of the weights' values as they are now."""
    settle_plan(layer)
    if layer.plan is not None and exponents_for(layer) != layer.plan.exponents:
        drop_plan(layer)


def watch_for_backward(layer: Any, output: Any) -> None:
    """After a forward: a backward through this output makes the plan suspect, if it has weights to train."""
    plan = layer.plan
    if plan is None or plan.suspect or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    node = (output[0] if isinstance(output, tuple) else output).grad_fn
    if node is not None and any(weight.requires_grad for weight in weights_of(layer)):
        node.register_prehook(plan.suspect_from_now_on)


@contextmanager
def plan_kept(layer: Any) -> Iterator[None]:
    """Around a move or a cast of the layer: a good plan stays good if the weights' float16 values are the same.

    They are, unless the layer has gone to a type that is neither fp32 nor float16, or off to the meta device.
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
