"""What keeps a certificate from holding for a model in memory: layers that scale by token, training, changed parts."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from ..code_copies import code_of, is_plain_linear, own_errors, sibling, stock_classes
from ..patches.architecture import QWEN2
from ..patches.attention import is_stock_eager
from ..patches.errors import PatchConflictError, Qwen2FP16FixError
from ..patches.layer_plan import can_scale_input, holds_gradients
from ..patches.linears import is_only_hooked, is_watched
from ..patches.planning import boundable_weights
from ..patches.range_bounds import CONTRACTIONS
from ..patches.swap import base_models, layers_of, module_at
from .assumptions import FP32_MAX, dropout_text, unbounded_settings

ATTENTION, MLP = QWEN2.path("attention"), QWEN2.path("mlp")
STALE = "its exponents were planned for other weights and have been dropped, so it scales by token: fix the model again"
GRADIENTS = (
    "a weight holds a gradient that an optimiser may apply, so it scales by token: set the gradients to None, then fix "
    "the model"
)
PARTS = "one of its weights is wrapped, quantised, sharded or not loaded here, so it scales by token"


def epsilons_of(base: Any) -> list[Any]:
    """The epsilon of each norm, each once."""
    norms = [getattr(base, QWEN2.final_norm())]
    norms += [module_at(layer, path) for layer in layers_of(base) for path in QWEN2.norms()]
    return list(dict.fromkeys(getattr(norm, "variance_epsilon", None) for norm in norms))


def by_token(base: Any) -> dict[int, str]:
    """Why a layer scales by token, or would once it is fixed, by the numbers of the layers that do.

    The plans of a fixed model that were made for other weights are dropped. The exponents of its inputs and values stay
    then, and hold for the older weights only.
    """
    found = {number: _why_by_token(layer) for number, layer in enumerate(layers_of(base))}
    return {number: reason for number, reason in found.items() if reason is not None}


def _why_by_token(layer: Any) -> str | None:
    is_fixed = hasattr(layer, "plan")
    if is_fixed:
        planning = sibling(code_of(layer), "planning")
        try:
            getattr(planning, "check_plan", planning.drop_stale_plan)(layer)  # the second of an export of 0.1.0
        except PatchConflictError as error:
            return str(error).rstrip(".")
        if layer.plan is not None:
            return None
    if holds_gradients(layer):
        return GRADIENTS
    if boundable_weights(layer) is None:
        return PARTS
    return STALE if is_fixed else None


def obstacles(base: Any) -> Iterator[str]:
    """Sentences about a Qwen2Model as it is now, whatever its weights are."""
    yield from unbounded_settings(base.config.to_dict(), epsilons_of(base))
    shares = {getattr(getattr(layer, ATTENTION), "attention_dropout", 0) for layer in layers_of(base) if layer.training}
    for dropout in filter(None, (dropout_text("attention_dropout", share) for share in shares)):
        yield f"it is in training, where {dropout}: call eval()"
    for name, buffer in base.named_buffers():
        if name.endswith("inv_freq") and not buffer.is_meta:
            angles = buffer.abs() * base.config.max_position_embeddings
            if not (angles < FP32_MAX).all():
                yield f"{name} holds frequencies whose angles are not finite in fp32"


def uncovered(model: nn.Module) -> list[str]:
    """What no certificate covers in the Qwen2 inside a model as it is now, in sentences. It checks no plan again."""
    found: list[str] = []
    for base in base_models(model, stock_classes(code_of(model))):
        layers = [layer for layer in layers_of(base) if hasattr(layer, "plan")]
        if count := sum(layer.plan is None for layer in layers):
            found.append(f"{count} of {len(layers)} layers scale by token, which no certificate covers")
        found += obstacles(base)
    return found


def unfixable(base: Any) -> str | None:
    """Why the fix cannot be applied to a Qwen2Model, or is not whole any more; None if it can be, or is."""
    code = code_of(base)
    try:
        with own_errors():
            code.check_modules(base)
            is_stock_eager(getattr(base.config, "_attn_implementation", None))  # raises if its scores are float16
    except Qwen2FP16FixError as error:
        return str(error).rstrip(".")
    return None


def changed_parts(layer: Any, exponents: Mapping[str, int], activation: str) -> Iterator[str]:
    """Parts of a layer that do not scale as its exponents say, or whose activation is not that of the config."""
    for site, exponent in (("input_norm", "input_norm"), ("post_norm", "post_norm")):
        for linear in QWEN2.fed_by(site) if exponents.get(exponent) else ():
            if _is_called_whole(module_at(layer, linear.name)):
                yield f"{linear.name} has backward hooks, so it is called as in stock, unscaled"
    for owner, scaled in ((ATTENTION, ("input_norm", "o_proj", "rotated")), (MLP, ("post_norm", "mlp"))):
        if hasattr(layer, "plan") and not can_scale_input(layer, owner) and any(map(exponents.get, scaled)):
            yield f"{owner} is stock's with this attention implementation and does not scale: choose eager or sdpa"
    found = type(getattr(getattr(layer, MLP), "act_fn", None))
    if activation in CONTRACTIONS and found is not type(ACT2FN[activation]):
        yield f"its activation is a {found.__name__}, but its config names {activation}"


def _is_called_whole(linear: nn.Module) -> bool:
    """Whether a plain linear cannot be split from its hooks: see patches/linears.py, `is_only_hooked`."""
    return is_plain_linear(linear) and is_watched(linear) and not is_only_hooked(linear)
