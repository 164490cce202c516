"""The product W·x of a linear without its bias, whether the linear is plain, quantised or wrapped by an adapter.

A bias of 300 makes float16 round the sum in steps of 0.25. So the product is computed alone, and the bias is added in
fp32. No module changes its class for that: loaders of quantised checkpoints ask `type(module) is nn.Linear`. A plain
linear's product comes from its weight. Any other linear is called through a view: a second object with the attributes
of the first, of a subclass without a bias. A module with hooks, or of a class that may add its bias in another way, is
called as it is: then the bias is rounded with the product, as in stock.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import swap
from .numerics import scaled_down

#: PEFT's adapters that add to a product or work on the input, by the names of their folders. road, ia3 and glora are
#: not here: they rotate, scale or replace the bias as well.
ADDITIVE = (
    "adalora beft boft c3a deft delora fourierft frod gralora hira hra lily loha lokr lora miss oft osf peanut psoft "
    "pvera randlora shira supertuning tinylora unilora vblora vera waveft"
)
#: Modules whose classes add their bias last, or let the linear that they wrap add it, and return W·x if it is None.
ADDING_LAST = (
    "bitsandbytes.nn.",
    "gptqmodel.nn_modules.qlinear.",
    "optimum.quanto.nn.",
    "transformers.integrations.finegrained_fp8",
    *(f"peft.tuners.{name}." for name in ADDITIVE.split()),
)
WATCHERS = ("forward_pre_hooks", "forward_hooks", "backward_hooks", "backward_pre_hooks")
#: nn.Linear's own forward; None if a tool has replaced it before this file was imported.
LINEAR_FORWARD = (
    nn.Linear.forward if getattr(nn.Linear.forward, "__globals__", None) is vars(nn.modules.linear) else None
)
NO_BIAS = property(lambda module: None)  # a plain class attribute would lose to that of a DataParallel replica

_views: dict[type, type] = {}  # class to the class of its views


def has_view(kind: type) -> bool:
    """Whether modules of this class return W·x once their bias is None. Makes the class of their views."""
    if kind is not nn.Linear and not kind.__module__.startswith(ADDING_LAST):
        return False
    if kind not in _views:
        _views[kind] = type(kind.__name__, (kind,), {"bias": NO_BIAS, "__module__": kind.__module__})
    return True


#: Compilers run it while they trace. torch's decorator for this would import torch's compiler with this file.
has_view._dynamo_marked_constant = True  # type: ignore[attr-defined]


def inner_linear(projection: Any) -> Any:
    """The linear inside a projection: the projection itself, or the one that a PEFT adapter wraps."""
    return projection.get_base_layer() if hasattr(projection, "get_base_layer") else projection


def may_change_bias(projection: nn.Module) -> bool:
    """Whether a projection is an adapter that is not known to leave the bias of its linear as it is."""
    parts: Any = [projection]
    while "base_layer" in parts[-1]._modules:
        parts.append(parts[-1].base_layer)
    return not all(has_view(type(adapter)) for adapter in parts[:-1])


def loaded_bias(projection: nn.Module) -> Tensor | None:
    """The bias of a projection: this rank's part if it is sharded; the copy outside the device if it is offloaded."""
    linear = inner_linear(projection)
    bias = getattr(linear, "bias", None)
    if not isinstance(bias, Tensor) or not bias.is_floating_point() or not bias.numel():  # ZeRO-3 leaves it empty
        return None
    if bias.is_meta:
        waiting = getattr(getattr(linear, "_hf_hook", None), "weights_map", None)  # accelerate's
        return None if waiting is None else waiting["bias"]
    if type(bias) in (Tensor, nn.Parameter):  # torch's compiler before 2.6 cannot ask a tensor for a method
        return bias
    return bias.to_local() if hasattr(bias, "to_local") else bias


def note_made_up(root: nn.Module, stock: Any, told: Any) -> None:
    """Notes in each layer of `root` which parameters were not loaded, by from_pretrained's loading info `told`.

    stock: transformers' Qwen2 classes, by name, as attributes.
    """
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in told.get("mismatched_keys") or ()]
    names = [*(told.get("missing_keys") or ()), *mismatched]
    for base in swap.base_models(root, stock):
        for index, layer in enumerate(swap.layers_of(base)):
            parts = [f".{name}".partition(f".layers.{index}.") for name in sorted(names)]
            note_missing(layer, [rest for _, _, rest in parts if rest])


def note_missing(layer: nn.Module, names: list[str]) -> None:
    """Remembers parameters of a layer, by their names in it, that were not in the checkpoint and are random."""
    floating = [name for name, parameter in layer.named_parameters() if parameter.is_floating_point()]
    layer.__dict__["missing"] = [name for name in names if name in floating]


def load_problem(layer: Any) -> str | None:
    """What is known to be wrong with the numbers in the linears of a layer, or None.

    Parameters that from_pretrained of a drop-in class has made up are known. Those that stock's has made up are not.
    """
    for name, linear in layer.named_modules():
        if name.endswith("_proj") and is_plain(linear) and not linear.weight.is_floating_point():
            kind = str(linear.weight.dtype).removeprefix("torch.")
            return f"{name} is a plain linear with {kind} weights, which only a quantised one can read"
    missing = layer.__dict__.get("missing")
    return f"{missing[0]} was not in the checkpoint, so its values are random" if missing else None


def project_exactly(
    projection: nn.Module, hidden_states: Tensor, exponent: int = 0, scaled: Tensor | None = None
) -> Tensor:
    """projection(hidden_states), in fp32 with an unrounded bias if the projection can be split.

    hidden_states (B, S, columns) in fp32 or the dtype of the matmul. exponent: the product is computed of 2^-exponent
    times the input and scaled back in fp32, where it may exceed float16's range; hooks then get it in fp32. A module
    that cannot be split is called as it is: its output, with its bias, is then rounded as stock's.
    scaled: `scaled_down(hidden_states, exponent)`, for a caller that has it.
    """
    bias = loaded_bias(projection)
    if exponent:
        return project_scaled(projection, hidden_states, bias, exponent, scaled)
    if bias is not None and is_separable(projection):
        product = product_of(projection, hidden_states)
        return product + bias.to(product.device).float()
    if bias is not None and is_only_hooked(projection) and not torch.is_inference_mode_enabled():
        return with_hooks(projection, hidden_states, bias)
    whole: Tensor = projection(hidden_states)
    return whole


def project_scaled(
    projection: nn.Module, hidden_states: Tensor, bias: Tensor | None, exponent: int, scaled: Tensor | None
) -> Tensor:
    """`project_exactly` with an exponent."""
    if is_separable(projection):
        known = scaled_down(hidden_states, exponent) if scaled is None else scaled
        return scaled_back(product_of(projection, known), bias, exponent)
    if is_only_hooked(projection):

        def forward(read: Tensor) -> Tensor:
            known = scaled if scaled is not None and read is hidden_states else scaled_down(read, exponent)
            return scaled_back(product_of(projection, known), bias, exponent)

        hooked: Tensor = stand_in(projection, forward)(hidden_states)
        return hooked
    whole: Tensor = projection(hidden_states.to(torch.float16))  # a wide norm's output is fp32
    return whole


def scaled_back(product: Tensor, bias: Tensor | None, exponent: int) -> Tensor:
    """2^exponent · product + bias, in fp32."""
    exact = product.float() * 2.0**exponent
    return exact if bias is None else exact + bias.to(product.device)


def is_only_hooked(projection: nn.Module) -> bool:
    """Whether a plain linear has hooks on its own forward and no others, so that a stand-in can serve them."""
    if torch.compiler.is_compiling() or not is_plain(projection):
        return False
    everywhere = nn.modules.module
    beyond = projection._backward_hooks or projection._backward_pre_hooks
    return not beyond and not any(getattr(everywhere, f"_global_{name}") for name in WATCHERS)


def stand_in(linear: Any, forward: Callable[[Tensor], Tensor]) -> nn.Module:
    """A module with the hooks of a linear and another forward. The hooks get the linear itself."""
    own: dict[str, Any] = {**linear.__dict__, "forward": forward}
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        own[hooks] = {key: functools.partial(call_hook, hook, linear) for key, hook in own[hooks].items()}
    made: nn.Module = with_attributes(nn.Module, own)
    return made


def with_hooks(linear: Any, hidden_states: Tensor, bias: Tensor) -> Tensor:
    """linear(hidden_states) with its hooks; exact wherever the hooks have not changed its output.

    So a hook that only reads changes no number. Gradients go through the output that the hooks got.
    """
    shown: list[Tensor] = []

    def forward(hidden_states: Tensor) -> Tensor:
        output: Tensor = type(linear).forward(linear, hidden_states)
        shown.extend((hidden_states, output.detach().clone()))
        return output

    whole: Tensor = stand_in(linear, forward)(hidden_states)
    hidden_states, kept = shown
    is_simple = type(whole) is Tensor and type(linear.weight) in (nn.Parameter, Tensor)
    if not is_simple or (whole.shape, whole.dtype) != (kept.shape, kept.dtype):
        return whole  # an output that a hook has made, or a shard's
    with torch.no_grad():
        exact = nn.functional.linear(hidden_states, linear.weight) + bias.to(hidden_states.device).float()
        exact = torch.where(whole == kept, exact, whole.float())
    return exact + (whole.float() - whole.detach().float()) if whole.requires_grad else exact


def call_hook(hook: Any, module: nn.Module, view: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A hook, called with the module that it was registered on."""
    return hook(module, *args, **kwargs)


def product_of(projection: Any, hidden_states: Tensor) -> Tensor:
    """W·x of a separable projection, in the dtype of its matmul."""
    if is_plain(projection):
        return nn.functional.linear(hidden_states, projection.weight)
    product: Tensor = view_of(projection)(hidden_states)
    return product


def is_separable(projection: nn.Module) -> bool:
    """Whether the product of a projection can be computed without its bias, and no hook is to get their sum."""
    return (is_plain(projection) and not is_watched(projection)) or is_viewable(projection)


def is_plain(linear: nn.Module) -> bool:
    """Whether a module computes W·x + b by nn.Linear's forward. Its weight may be a shard, a property or quantised."""
    return type(linear).forward is LINEAR_FORWARD and "forward" not in linear.__dict__


def is_watched(module: nn.Module) -> bool:
    """Whether a hook, of the module or of all modules, gets its inputs, its output or their gradients."""
    everywhere = nn.modules.module
    return any(getattr(module, f"_{name}") or getattr(everywhere, f"_global_{name}") for name in WATCHERS)


def is_viewable(module: Any) -> bool:
    """Whether a module and all that it wraps can be called through a view."""
    if not has_view(type(module)) or is_watched(module) or ("forward" in module.__dict__ and not is_aligned(module)):
        return False
    base = module._modules.get("base_layer")
    if base is None:
        return True
    about_to_unmerge = module.merged and module.disable_adapters  # its forward may then change the bias as well
    return not about_to_unmerge and is_viewable(base)


def is_aligned(module: nn.Module) -> bool:
    """Whether a module's own forward is accelerate's, which moves tensors to a device and back."""
    forward, kept = module.__dict__["forward"], module.__dict__.get("_old_forward")
    by_accelerate = isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks"
    return by_accelerate and getattr(kept, "__func__", None) is type(module).forward


def view_of(module: Any) -> Any:
    """A viewable module without its bias: called, it returns W·x. It shares the module's attributes."""
    own: dict[str, Any] = module.__dict__
    base = own["_modules"].get("base_layer")
    if base is not None:  # some adapters hold it under a second name as well
        inner = view_of(base)
        own = {**own, "_modules": {name: inner if part is base else part for name, part in own["_modules"].items()}}
    view = with_attributes(_views[type(module)], own)
    if "forward" not in own:
        return view
    return with_attributes(type(view), {**own, "forward": functools.partial(call_aligned, module, view)})


def with_attributes(kind: type, attributes: dict[str, Any]) -> Any:
    """An object of that class with these attributes, not copied."""
    view: Any = object.__new__(kind)
    object.__setattr__(view, "__dict__", attributes)
    return view


def call_aligned(module: Any, view: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a view of `module`, while accelerate has that module's weights on the device."""
    hook = module._hf_hook
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not hook.no_grad):
        output = type(view).forward(view, *args, **kwargs)
    return hook.post_forward(module, output)
