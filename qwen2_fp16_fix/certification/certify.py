"""The certificate: whether any prompt can make a checkpoint overflow in float16. The weights alone decide it.

A checkpoint is read layer by layer. No model is built.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from os import PathLike
from typing import Any

from torch import Tensor

from ..checkpoints.folder import FolderSource
from ..checkpoints.hub_ids import checkpoint_at
from ..checkpoints.loaded_model import ModelSource
from ..checkpoints.threads import own_cores
from ..code_copies import model_in
from ..patches.swap import layers_of
from ..progress import Progress, with_bar
from ..translations import number_text
from .assumptions import EPSILON, assumptions_of, residual_obstacles, unbounded_settings
from .casting import casting_losses
from .ends import certify_ends
from .in_memory import by_token, changed_parts, obstacles, unfixable
from .layer import certify_layer
from .result import Certificate, LayerCertificate
from .text import verdict_of


@own_cores()
def certify(model_or_path: Any, progress: Progress = None, *, language: str = "en") -> Certificate:
    """Bounds every float16 number of a Qwen2 and says whether, with the fix, any prompt can overflow it.

    Args:
        model_or_path: A checkpoint folder, a .safetensors file with config.json beside it, OWNER/NAME or
            OWNER/NAME@REVISION on the Hub, or a loaded model with a Qwen2Model inside. A pipeline or a Trainer stands
            for its model.
        progress: True for a bar on stderr, or a rich Console to show it on.
        language: Language of the verdict and of what is printed: "en" or "zh".

    Returns:
        A Certificate. `proven`, `verdict` and `reasons` give the outcome, `layers` the headroom of each site.

    Raises:
        CheckpointError: A folder or file cannot be read completely.
        HubError: The Hub cannot be reached, or does not give the checkpoint.
        NotQwen2Error: The checkpoint or model has another architecture.
    """
    started = time.monotonic()
    source = source_of(model_or_path)
    losses: dict[str, Counter[str]] = {}

    def cast(name: str, stored: Tensor) -> Tensor:
        losses.setdefault(name, Counter()).update(casting_losses(stored) | {"total": stored.numel()})
        return stored.half()

    config, unbounded = settings_of(source)
    assumed = assumptions_of(config, source.shape.positions)
    logits, residual, reasons = certify_ends(source, cast)
    layers = []
    for number in with_bar(range(source.layers), "bounding layers", progress):
        layer, residual = certify_layer(number, source, cast, residual)
        layers.append(layer)
    casting = {name: dict(lost) for name, lost in losses.items() if len(+lost) > 1}  # more than its total
    reasons += [*unbounded, *(residual_obstacles(residual, source.shape.hidden))]
    reasons += in_memory(source, layers) if isinstance(source, ModelSource) else []
    reasons += [f"layer {layer.layer}: {reason}" for layer in layers for reason in layer.reasons]
    for kind, what in (("overflow", "numbers over float16's limit of 65,504"), ("nonfinite", "NaN or infinity")):
        reasons += [f"{name} holds {what} ({number_text(lost[kind])})" for name, lost in casting.items() if lost[kind]]
    exponents = [max(layer.exponents.values(), default=0) for layer in layers]
    scaled = sum(exponent > 0 for exponent in exponents)
    return Certificate(
        proven=not reasons,
        verdict=verdict_of(reasons, assumed, layers, language),
        reasons=reasons,
        assumes=assumed.sentences(),
        layers=layers,
        logits=logits if logits is not None and math.isfinite(logits) else None,
        casting=casting,
        scaled_layers=scaled,
        max_exponent=max(exponents, default=0),
        config=asdict(source.shape) | {"layers": source.layers, "intermediate": source.intermediate},
        seconds=round(time.monotonic() - started, 2),
        language=language,
    )


def source_of(model_or_path: Any) -> FolderSource | ModelSource:
    """The weights of a checkpoint or of a loaded model."""
    if not isinstance(model_or_path, str | PathLike):
        return ModelSource(model_in(model_or_path, also="a checkpoint folder, OWNER/NAME, "))
    with checkpoint_at(model_or_path) as found:
        source = FolderSource(found)
        source.check_complete(head=None)  # an embedding of another vocabulary has a bound, but belongs to another model
    return source


def settings_of(source: FolderSource | ModelSource) -> tuple[Mapping[str, Any], list[str]]:
    """The config, and a sentence for each setting of it whose numbers the weights do not bound."""
    if isinstance(source, ModelSource):
        return source.base.config.to_dict(), list(obstacles(source.base))
    epsilon = source.config.get("rms_norm_eps")
    return source.config, unbounded_settings(source.config, [EPSILON if epsilon is None else epsilon])


def in_memory(source: ModelSource, layers: list[LayerCertificate]) -> Iterator[str]:
    """What keeps the layers of a loaded model from running as the bounds have it, for layers that are proven."""
    if conflict := unfixable(source.base):
        yield conflict
    unplanned = by_token(source.base)
    for found, layer in zip(layers, layers_of(source.base), strict=True):
        if found.proven:
            reasons = [unplanned[found.layer]] if found.layer in unplanned else []
            reasons += changed_parts(layer, found.exponents, source.shape.activation)
            yield from (f"layer {found.layer}: {reason}" for reason in reasons)
