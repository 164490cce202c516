"""The plan of one layer: its exponents, the weights it holds for, and what ends it.

Some changes of a weight leave a trace (`weight_versions`), and some leave none: fused optimisers, `.data`, numpy. So a
plan also ends after a backward through its layer, because an optimiser is about to write, and after a forward that was
not finite: an exponent that is too small can only overflow (`overflow.py`). A layer without a plan scales by token.

The state of the plan is written in this file alone, as entries of the layer's `__dict__`. nn.Module would take the
rotary embedding for a child of the layer, and its `__setattr__` is slower.

- `plan`: the plan, or None.
- `plan_due`: whether the next forward makes one.
- `traced`: whether a compiler has traced the layer.
- `is_wide`, of a norm; the exponents that attention and MLP keep of their inputs, values and rotated keys
  (`keep_ranges`): a plan sets them, and they stay when it ends, so that a cache and other threads never see two of them
  mixed.
- `rotary`, `watch`: the model's rotary embedding, and the OverflowWatch of its last hidden state.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import QWEN2
from .errors import MetaTensorError, NotFixedWarning, StalePlanWarning
from .overflow import OverflowWatch
from .range_bounds import Exponents, LayerBounds
from .range_plan import FLOAT16_MAX
from .scaling import Ranges, Scaled
from .swap import UNLOADED, module_at

OWNERS = QWEN2.owners()  # the parts of a layer that hold its linears
SCALED_OWNERS = QWEN2.scaled_owners()
LAST_LINEAR = QWEN2.linears[-1].name
ATTENTION, MLP = QWEN2.path("attention"), QWEN2.path("mlp")


@dataclass(eq=False)
class Plan:
    """The exponents of a layer, and the weights they were made for."""

    exponents: Exponents
    versions: tuple[Any, ...]  # of the weights, see `weight_versions`
    device: torch.device  # where the weights are
    suspect: bool = False  # after a backward through the layer: its weights may change without a trace

    def suspect_from_now_on(self, *_: Any) -> None:
        """A hook for autograd."""
        self.suspect = True


def prepare_layer(layer: Any, rotary: Any, watch: OverflowWatch) -> None:
    """Gives a layer what planning needs, and makes a plan due."""
    layer.__dict__.update(rotary=rotary, watch=watch, plan_due=True)


def expect_plan(layer: Any) -> None:
    """Makes a plan due. The one that is there stays until then.

    A layer that was built by itself, from the class of a fixed one, has no rotary embedding and waits for a `fix`.
    """
    layer.__dict__["plan_due"] = layer.rotary is not None


def finish_planning(layer: Any) -> None:
    """Notes that no plan is due any more. It comes last: another thread runs the layer from here on."""
    layer.__dict__["plan_due"] = False


def can_scale_input(layer: Any, owner: str) -> bool:
    """Whether a part scales its own input: not flash attention before 4.48, which is stock's."""
    return hasattr(getattr(layer, owner), "keep_ranges" if owner == ATTENTION else "keep_input_exponent")


def keep_ranges(layer: Any, exponents: Exponents) -> None:
    """Gives attention and MLP the exponents that stay when a plan ends."""
    if can_scale_input(layer, ATTENTION):
        ranges = Ranges(exponents.input_norm, exponents.o_proj, exponents.rotated)
        getattr(layer, ATTENTION).keep_ranges(ranges, device_of_norm(layer))
    if can_scale_input(layer, MLP):
        getattr(layer, MLP).keep_input_exponent(exponents.post_norm)


def device_of_norm(layer: Any) -> torch.device:
    """Where a layer is, by its first norm: some quantised linears have no weight."""
    device: torch.device = module_at(layer, next(iter(QWEN2.norms()))).weight.device
    return device


def widen_norms(layer: Any, bounds: LayerBounds | None) -> None:
    """Lets those norms return fp32 whose output may exceed float16's range, and no others. None: nothing is proven."""
    for path in QWEN2.norms():
        site = next(site for site in QWEN2.sites if site.at == f"{path}:output")
        can_read = all(can_scale_input(layer, linear.owner) for linear in QWEN2.fed_by(site.name))
        is_wide = bounds is not None and getattr(bounds, str(site.bound)) > FLOAT16_MAX
        module_at(layer, path).__dict__["is_wide"] = is_wide and can_read


def keep_plan(layer: Any, exponents: Exponents) -> None:
    """Gives the layer its exponents, for its weights as they are."""
    device = module_at(layer, LAST_LINEAR).weight.device
    keep_ranges(layer, exponents)
    for exponent, owner in SCALED_OWNERS.items():
        part = getattr(layer, owner)
        if isinstance(part, Scaled):  # before 4.48, flash attention is stock's, and its o_proj is not scaled
            part.set_exponent(getattr(exponents, exponent), device)
    layer.__dict__["plan"] = Plan(exponents, weight_versions(layer), device)


def drop_plan(layer: Any, due: bool = False) -> None:
    """Ends the plan: the layer scales by token. due: only until its next forward, which makes a new plan.

    What `keep_ranges` and `widen_norms` have set stays.
    """
    for owner in OWNERS:
        part = getattr(layer, owner)
        if hasattr(part, "set_exponent"):  # also inside a wrapper, which isinstance does not see through
            part.set_exponent(None)
    layer.__dict__.update(plan=None, plan_due=due and layer.rotary is not None)


def note_trace(layer: Any) -> None:
    """Notes that a compiler has traced the layer."""
    layer.__dict__["traced"] = True


def forget_plan(layer: Any) -> None:
    """Removes the whole state, and the exponents of the parts: the layer becomes stock."""
    for owner in OWNERS:
        for name in ("scale", "ranges", "input_exponent"):
            getattr(layer, owner).__dict__.pop(name, None)
    for path in QWEN2.norms():
        module_at(layer, path).__dict__.pop("is_wide", None)
    for name in ("plan", "plan_due", "traced", "rotary", "watch"):
        layer.__dict__.pop(name, None)


def drop_stale_plan(layer: Any) -> None:
    """Drops a plan that may not hold for the weights any more. The values of the weights are not read.

    Weights on another device were dispatched one by one, by a tool that calls no method of the layer. Their plan is
    made again.
    """
    plan = layer.plan
    if plan is None:
        return
    if layer.watch.has_overflowed():
        warn_of_overflow(layer.watch)
    elif not plan.suspect and plan.versions == weight_versions(layer):
        return
    drop_plan(layer, due=layer.plan_due or any(weight.device != plan.device for weight in weights_of(layer)))


def watch_for_backward(layer: Any, output: Any) -> None:
    """After a forward: a backward through this output makes the plan suspect, if the layer has weights to train."""
    plan = layer.plan
    if plan is None or plan.suspect or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    node = (output[0] if isinstance(output, tuple) else output).grad_fn
    if node is not None and any(weight.requires_grad for weight in weights_of(layer)):
        node.register_prehook(plan.suspect_from_now_on)


def warn_of_overflow(watch: OverflowWatch) -> None:
    """Warns, once, that a forward was not finite although every layer was planned to be."""
    if not watch.said:
        watch.said = True
        warnings.warn(STALE, StalePlanWarning, stacklevel=2)


STALE = (
    "a forward of this model ended in inf or NaN: its input or a weight was not finite, or weights were changed in a "
    "way that leaves no trace, and the exponents belong to the old ones. From now on every layer scales by token; call "
    "qwen2_fp16_fix.fix(model) or model.eval() to plan the exponents again."
)


UNPLANNED = (
    "this model has not run since it was built or loaded, so what is exported or traced now stores its keys uncentred, "
    "as stock does, and scales by token: first run a forward, or call qwen2_fp16_fix.fix(model)."
)


def warn_of_no_plan(layer: Any) -> None:
    """Warns if a model is traced or exported before its keys were centred."""
    if layer.plan_due and getattr(layer, ATTENTION).shift is None:
        warnings.warn(UNPLANNED, NotFixedWarning, stacklevel=2)


def children_of(layer: Any) -> list[nn.Module]:
    """The children of a layer, and the children of those that hold linears: all norms and linears are among them."""
    parts = layer._modules
    children = [*parts.values()]
    for owner in OWNERS:
        children += parts[owner]._modules.values()
    return children


def weights_of(layer: Any) -> list[Tensor]:
    """The parameters of `children_of`. Those further inside, of an adapter or a quantiser, are not listed."""
    return [weight for child in children_of(layer) for weight in child._parameters.values() if weight is not None]


def weight_versions(layer: Any) -> tuple[Any, ...]:
    """Changes whenever a weight of the layer is replaced, moved, or written to in a way that torch counts."""
    weights = weights_of(layer)
    if are_transformed(weights):
        return ()
    versions = [0 if weight.is_inference() else weight._version for weight in weights]
    return (*map(id, children_of(layer)), *map(id, weights), *map(Tensor.data_ptr, weights), *versions)


def are_transformed(weights: list[Tensor]) -> bool:
    """Whether torch.func has replaced the weights by tensors that have no address and no version."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, weights))


def holds_gradients(layer: Any) -> bool:
    """Whether a weight of the layer has a gradient, which an optimiser can still apply."""
    return any(weight.grad is not None for weight in layer.parameters())


def unloaded_weight(layer: Any) -> str | None:
    """The name of a plain weight that is on the meta device and that nothing will load during a forward, or None."""
    for path in (*QWEN2.norms(), *(linear.name for linear in QWEN2.linears)):
        part: Any = module_at(layer, path)
        if (type(part) is nn.Linear or path in QWEN2.norms()) and part.weight.is_meta:
            is_loaded_later = hasattr(part, "_hf_hook") or part._forward_pre_hooks or "forward" in part.__dict__
            if not is_loaded_later:
                return f"{path}.weight"
    return None


def refuse_unloaded(layer: Any) -> None:
    """Raises MetaTensorError if a weight of the layer is not loaded."""
    name = unloaded_weight(layer)
    if name is not None:
        raise MetaTensorError(UNLOADED.format(f"layers.{getattr(layer, ATTENTION).layer_idx}.{name}"))
